"""Gradient checkpointing: activations of a block are computed anew in the backward pass, not kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import nn

from expunge.core.errors import NeedsError
from expunge.core.runtime import Runtime


@contextlib.contextmanager
def recomputed(model: nn.Module, runtime: Runtime) -> Iterator[None]:
    """Let a transformers model keep no activations for a while, where the runtime asks for it.

    Raises:
        NeedsError: the model has no blocks that can be computed anew.
    """
    if not runtime.gradient_checkpointing:
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise NeedsError(
            f"{type(model).__name__} offers no gradient checkpointing, as models of transformers do; "
            "use smaller batches"
        )
    before = recomputes(model)
    # the other kind gives no gradient to adapters of a frozen model
    _switch(model, "enable")({"use_reentrant": False})
    try:
        yield
    finally:
        if not before:
            _switch(model, "disable")()
            inputs: Callable[[], None] = getattr(model, "disable_input_require_grads", lambda: None)
            inputs()  # which the switch turns on and leaves on


def _switch(model: nn.Module, what: str) -> Callable[..., None]:
    """The switch by its newer name or the older one, whichever this transformers has."""
    older = f"gradient_checkpointing_{what}"
    found: Callable[..., None] = getattr(model, f"activation_checkpointing_{what}", None) or getattr(model, older)  # fmt: skip
    return found


def recomputes(model: nn.Module) -> bool:
    """Whether some block of a model is set to compute its activations anew."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
