"""Methods for regressors."""
