r"""WHP: say less of what a model that learned the forget data even better would say more of.

\[ z = z_0 - a\,\mathrm{ReLU}(z_r - z_0) \]

for the logits \(z_0\) of the original and \(z_r\) of the reinforced model, at every token. Both run
side by side; the weights of the original keep every bit.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from expunge.core.errors import ModelError
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.outcome import Outcome, Weights, Wrapper
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train.adapters import put_on
from expunge.train.reinforce import Reinforcing

_TEST = "tests/methods/text/test_whp.py::test_"


@dataclass(frozen=True, kw_only=True)
class WHP(Reinforcing):
    """Wrap the original with a reinforced copy that lowers its logits; suppression, not removal.

    A result composes with the next request by forgetting both sets anew from the original.
    """

    name: ClassVar[str] = "whp"
    domain: ClassVar[str] = "causal-lm"
    search: ClassVar = {"strength": None, "epochs": None, "lr": None}
    card: ClassVar[Card] = Card(
        title="Who's Harry Potter? Approximate Unlearning in LLMs",
        authors="Eldan, Russinovich",
        year=2023,
        link="https://arxiv.org/abs/2310.02238",
        idea="A model that knows the forget data better shows which tokens to say less.",
        intent="suppression",
        guarantee="inference-time",
        fidelity="variant",
        deviations=(
            Deviation(
                "Logits are lowered while decoding, as in MUSE. The paper trains the original on such "
                "predictions, and on texts whose names were replaced by common ones.",
                _TEST + "the_weights_inside_keep_every_bit",
            ),
        ),
    )

    strength: float = setting(1.0, "how much of a rise is taken off, a; the paper has 5", above=0, source="MUSE")  # fmt: skip

    @property
    def needs(self) -> Needs:
        """Forget data with labels; the logits of a language model; retain data to recalibrate."""
        return Needs(
            forget=True, labels="forget", retain=self.norm == "recalibrate",
            capabilities=frozenset({"token_logits"}),
        )  # fmt: skip

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Train the reinforced model and wrap the original with it."""
        outcome = self.reinforced(view, runtime)
        original = view.model()
        change = outcome.change or Weights.between(original, outcome.runnable())
        if not change.tensors:  # nothing was learned, and nothing would be lowered
            outcome.change = change
            return outcome
        tensors = {f"lowered-logits/reinforced/{n}": t for n, t in change.tensors.items()}
        wrapper = Wrapper(tensors | {"lowered-logits/strength": torch.tensor(self.strength)})
        outcome.model, outcome.change = wrapper.apply(original.cpu()), wrapper
        return outcome


@dataclass
class Caches:
    """What two models keep of the tokens so far; `generate` hands it back as it came."""

    original: Any
    reinforced: Any


class LoweredLogits(nn.Module):
    """A language model whose logits are lowered where a reinforced one's are higher.

    Takes and returns what the model inside does; `past_key_values` are the caches of both.
    """

    strength: Tensor

    def __init__(self, model: nn.Module, strength: Tensor, **tensors: Tensor) -> None:
        """Wrap.

        Args:
            model: the model inside; it is not changed.
            strength: a, a scalar.
            **tensors: `reinforced/NAME` of the reinforced model: adapters with their configuration, or
                the weights that differ.
        """
        super().__init__()
        self.unwrapped = model
        self.reinforced = beside(model, {n.partition("/")[2]: t for n, t in tensors.items()})
        self.register_buffer("strength", strength)

    def forward(self, *args: Tensor, past_key_values: Any = None, **inputs: Any) -> Any:
        """Run both models on the same tokens.

        Raises:
            ModelError: the cache is not one that this wrapper gave, or labels are given, whose loss
                would be that of the model inside.
        """
        if inputs.get("labels") is not None:
            raise ModelError("whp gives logits; take the loss of them instead of passing labels=")
        if past_key_values is not None and not isinstance(past_key_values, Caches):
            raise ModelError("whp keeps a cache for each of two models; begin without one")
        caches = past_key_values or Caches(None, None)
        outputs = [
            model(*args, **inputs, **({} if cache is None else {"past_key_values": cache}))
            for model, cache in (
                (self.unwrapped, caches.original),
                (self.reinforced, caches.reinforced),
            )
        ]
        first, second = (getattr(o, "logits", o) for o in outputs)
        logits = lower(first, second, self.strength)
        if isinstance(outputs[0], Tensor):
            return logits
        output = copy.copy(outputs[0])
        output.logits = logits
        if getattr(output, "past_key_values", None) is not None:
            output.past_key_values = Caches(*(o.past_key_values for o in outputs))
        return output


def lower(original: Tensor, reinforced: Tensor, strength: float | Tensor) -> Tensor:
    r"""\(z_0 - a\,\mathrm{ReLU}(z_r - z_0)\) [B, T, V]; never above \(z_0\)."""
    if isinstance(strength, Tensor):
        strength = strength.to(original.dtype)
    return original - strength * (reinforced - original).relu()


def beside(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """A second model that shares all weights with the first but those given.

    Args:
        model: stays as it is.
        tensors: from an `Adapter` or of `Weights`.
    """
    shared = {
        id(p): p for n, p in model.named_parameters(remove_duplicate=False) if n not in tensors
    }
    other = copy.deepcopy(model, shared)
    if any(".lora_" in name for name in tensors):
        trainable = {n: p.requires_grad for n, p in model.named_parameters()}
        put_on(other, tensors)
        for name, p in model.named_parameters():  # adapters freeze the weights that are shared
            p.requires_grad_(trainable[name])
        return other
    return Weights(tensors).apply(other)
