r"""DM-Direct: no training; a wrapper subtracts the predicted change from the logits of known inputs.

\[ \hat f(x) = f_0(x) - \kappa \sum_{i \in D_f} \beta[i, \mathrm{index}(x), :] \]

The index finds an input by its exact content, in the number format it was prepared with, and by what is
left of it in a narrower one. An input that is not in it gets the original's answer, or is refused. The weights keep every bit: what is to be forgotten is no longer said, and still known.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from expunge.core.data import Inputs, map_inputs
from expunge.core.errors import DataError
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.outcome import Outcome, Wrapper
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.fleet.datamodels import Attributing, rows_of

_TEST = "tests/methods/test_dmm.py::test_"


@dataclass(frozen=True, kw_only=True)
class DMDirect(Attributing):
    """Answer known inputs as attribution predicts a retrained model would; suppression, not removal.

    A result composes with the next request by adding up: wrap the original anew with the effects of
    both forget sets.
    """

    name: ClassVar[str] = "dm-direct"
    known_inputs_only: ClassVar[bool] = True
    search: ClassVar = {"multiplier": None}
    card: ClassVar[Card] = Card(
        title="Attribute-to-Delete: Machine Unlearning via Datamodel Matching",
        authors="Georgiev, Rinberg, Park, Garg, Ilyas, Madry, Neel",
        year=2024,
        link="https://arxiv.org/abs/2410.23232",
        idea="Subtract from the answers what attribution says the data added to them.",
        intent="suppression",
        guarantee="inference-time",
        fidelity="variant",
        deviations=(
            Deviation(
                "Effects are estimated as for datamodel-matching: ridge regression, λ on held-out "
                "subsets.",
                _TEST + "lambda_is_the_best_on_held_out_trainings",
            ),
            Deviation(
                "Inputs are found by their content, not by a position in a data set; others get the "
                "original's answer, or an error with refuse=true.",
                _TEST + "dm_direct_knows_inputs_by_their_content",
            ),
        ),
    )

    validation: bool = setting(False, "also answer validation inputs as predicted")
    refuse: bool = setting(False, "refuse inputs that are not known; else the original answers")

    @property
    def needs(self) -> Needs:
        """Inputs without labels; the recipe, or labels, for the estimate of effects."""
        return Needs(
            forget=True, retain=True, labels=self.attribution_labels, validation=self.validation,
            recipe=self.attribution_trains, capabilities=frozenset({"logits"}),
        )  # fmt: skip

    def run(
        self, view: View, runtime: Runtime, prepared: Mapping[str, Tensor] | None = None
    ) -> Outcome:
        """Index the inputs and wrap the model.

        Args:
            view: the inputs, without labels.
            runtime: device.
            prepared: the effects from `prepare`.

        Returns:
            The outcome; its change is a `Wrapper`.
        """
        assert prepared is not None  # `unlearn` sees to it
        change = self.change(prepared, view.forget.ids)
        trained = len(prepared["train_ids"])
        count = trained + (len(view.validation) if self.validation else 0)
        keys = torch.zeros(1 + len(NARROW), count, dtype=torch.long, device=runtime.device)
        for batch in view.everything.batches(512):
            keys[:, rows_of(prepared, batch.ids)] = all_keys(batch.x).to(keys)
        for batch in view.validation.batches(512) if self.validation else ():
            at = (batch.ids.cpu()[:, None] == view.validation.ids).int().argmax(1)
            keys[:, trained + at] = all_keys(batch.x).to(keys)
        keys = runtime.sum(keys).cpu()  # each process read its share
        formats = formats_of(view.everything.fetch(view.everything.ids[:1]).x)
        wrapper = Wrapper({
            f"shifted-logits/{name}": tensor
            for name, tensor in index(keys, change[:count], formats, self.refuse).items()
        })
        known = len(keys[0].unique())
        details = {"known_inputs": known, "norm": "untouched"} | self.facts(prepared)
        return Outcome(wrapper.apply(view.model().cpu()), wrapper, details=details)


class ShiftedLogits(nn.Module):
    """A classifier whose logits are shifted for inputs it knows.

    Takes and returns what the model inside does: logits [B, C], or an object with `.logits`.
    """

    def __init__(
        self,
        model: nn.Module,
        keys: Tensor,
        shift: Tensor,
        refuse: Tensor,
        formats: Tensor | None = None,
    ) -> None:
        """Wrap.

        Args:
            model: the model inside; it is not changed.
            keys: content keys of the known inputs, int64 [N], ascending.
            shift: what is subtracted from their logits, float32 [N, C].
            refuse: bool scalar: whether unknown inputs are an error.
            formats: of the numbers that the keys were made of, int64, one for each input by name; as
                they come if None.
        """
        super().__init__()
        self.unwrapped = model
        self.register_buffer("keys", keys)
        self.register_buffer("shift", shift)
        self.register_buffer("refuse", refuse)
        # whole numbers, since a model that is turned into another precision takes its buffers along
        self.register_buffer("formats", formats)

    def forward(self, *args: Tensor, **inputs: Tensor) -> Any:
        """Run the model inside and shift its logits.

        Raises:
            DataError: an input is not known and unknown ones are refused.
        """
        output = self.unwrapped(*args, **inputs)
        logits = getattr(output, "logits", output)
        asked = self._asked(args[0] if args else inputs).to(logits.device)
        keys, shift = self.get_buffer("keys"), self.get_buffer("shift")
        rows = torch.searchsorted(keys, asked).clamp_max(len(keys) - 1)
        known = keys[rows] == asked
        if bool(self.get_buffer("refuse")) and not bool(known.all()):
            raise DataError("dm-direct answers only the inputs it was prepared for")
        moved = logits - torch.where(known[:, None], shift[rows], 0.0).to(logits.dtype)
        if isinstance(output, Tensor):
            return moved
        output = copy.copy(output)
        output.logits = moved
        return output

    def _asked(self, x: Inputs) -> Tensor:
        """Keys of inputs in the formats they were prepared with."""
        parts = {"": x} if isinstance(x, Tensor) else x
        places = [] if self.formats is None else self.get_buffer("formats").tolist()
        if len(places) != len(parts):  # other inputs than those it was prepared with
            return content_keys(x)
        known = {n: FORMATS[p] for n, p in zip(sorted(parts), places, strict=True) if p >= 0}
        return content_keys({n: t.to(known.get(n, t.dtype)) for n, t in parts.items()})


FORMATS = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
"""Number formats of inputs, by their place."""

NARROW = (torch.float32, torch.float16, torch.bfloat16)
"""Formats that a model may be turned into; inputs are also known by what is left of them there."""


def formats_of(x: Inputs) -> Tensor:
    """Places in `FORMATS` of each input's numbers, in the order of names; −1 for others."""
    parts = [x] if isinstance(x, Tensor) else [x[name] for name in sorted(x)]
    return torch.tensor([FORMATS.index(p.dtype) if p.dtype in FORMATS else -1 for p in parts])


def all_keys(x: Inputs) -> Tensor:
    """Content keys [1 + len(NARROW), B]: exact, then of the inputs once they were in each format."""

    def through(narrow: torch.dtype) -> Any:
        return map_inputs(x, lambda t: t.to(narrow).to(t) if t.is_floating_point() else t)

    return torch.stack([content_keys(x), *(content_keys(through(n)) for n in NARROW)])


def index(keys: Tensor, shift: Tensor, formats: Tensor, refuse: bool) -> dict[str, Tensor]:
    """Tensors of `ShiftedLogits`: keys ascending, equal inputs once, with the mean of their shifts.

    Equal inputs have equal logits in every model, so their shifts differ by estimation noise alone.
    What is left of an input in a narrower format counts where no input is exactly that.

    Args:
        keys: from `all_keys` [1 + len(NARROW), N].
        shift: [N, C].
        formats: from `formats_of`.
        refuse: whether unknown inputs are an error.
    """
    exact, shifts = _once(keys[0], shift)
    rest, repeated = keys[1:].reshape(-1), shift.repeat(len(keys) - 1, 1)
    new = ~torch.isin(rest, exact)
    left, lost = _once(rest[new], repeated[new])
    every, order = torch.cat([exact, left]).sort()
    return {
        "keys": every,
        "shift": torch.cat([shifts, lost])[order],
        "refuse": torch.tensor(refuse),
        "formats": formats,
    }


def _once(keys: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Each key once, with the mean of its shifts."""
    unique, group = keys.unique(return_inverse=True)
    counts = group.bincount(minlength=len(unique))
    total = torch.zeros(len(unique), shift.shape[1]).index_add_(0, group, shift)
    return unique, total / counts[:, None]


def content_keys(x: Inputs) -> Tensor:
    """Content keys int64 [B]: 8 bytes of the SHA-256 of each input's numbers, by name if several."""
    parts = [x] if isinstance(x, Tensor) else [x[name] for name in sorted(x)]
    rows = [p.detach().cpu().contiguous() for p in parts]
    digests = [
        hashlib.sha256(b"".join(r[i].reshape(-1).view(torch.uint8).numpy().tobytes() for r in rows))
        for i in range(len(rows[0]))
    ]
    keys = [int.from_bytes(d.digest()[:8], "big", signed=True) for d in digests]
    return torch.tensor(keys, dtype=torch.long)
