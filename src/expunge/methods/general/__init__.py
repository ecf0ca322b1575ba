"""Methods for any differentiable model whose needs are met."""
