"""Outcome: the model a method returns, the change it made, its curve and its cost."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from expunge.core.errors import ExpungeError, ModelError, StoreError
from expunge.core.hashing import hash_model, hash_tensors, plain

if TYPE_CHECKING:
    from expunge.core.problem import Problem
    from expunge.core.request import Request


@dataclass
class Cost:
    """What a run used: wall seconds, samples touched, per-sample gradient evaluations, memory.

    `processor` are CPU seconds of the process where the CPU does all the work, and 0 where an
    accelerator does; `samples` counts every sample every time it is read; `gradients` counts one
    for each sample in each backward pass; `peak_bytes` is the growth of memory over the start.
    """

    seconds: float = 0.0
    samples: int = 0
    gradients: int = 0
    peak_bytes: int = 0
    processor: float = 0.0

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Cost:
        """The cost that a record holds."""
        return cls(**{f.name: record[f.name] for f in fields(cls) if f.name in record})

    def ratio(self, others: Sequence[Cost]) -> float | None:
        """This cost over the mean of others, in time; None if they took none.

        In CPU seconds if all were counted, which other programs on the machine disturb least,
        else in wall seconds.
        """
        counted = all(c.processor for c in (self, *others))
        times = [c.processor if counted else c.seconds for c in (self, *others)]
        return times[0] * len(others) / sum(times[1:]) if sum(times[1:]) else None


@dataclass(frozen=True)
class Change:
    """A difference between two models that can be applied."""

    tensors: Mapping[str, Tensor]
    kind: ClassVar[str] = "change"

    def apply(self, model: nn.Module) -> nn.Module:
        """Apply to `model` in place and return it."""
        raise NotImplementedError

    @property
    def whole(self) -> bool:
        """Whether it carries all weights, so that any model of the architecture will do for `apply`."""
        return False

    def hash(self) -> str:
        """SHA-256 of the tensors."""
        return hash_tensors(self.tensors)


@dataclass(frozen=True)
class Weights(Change):
    """The new values of every tensor that changed. Holds nothing of the old values."""

    kind: ClassVar[str] = "weights"

    @classmethod
    def between(cls, before: nn.Module, after: nn.Module) -> Weights:
        """Collect the tensors of `after` that differ from `before` in any bit."""
        old = before.state_dict()
        new = {k: v.detach().cpu() for k, v in after.state_dict().items()}
        return cls({
            k: v.clone() for k, v in new.items() if k not in old or not _same(old[k].cpu(), v)
        })

    def apply(self, model: nn.Module) -> nn.Module:
        """Copy the new values into `model`."""
        _copy_into(model, self.tensors)
        return model


@dataclass(frozen=True)
class Delta(Change):
    """The bitwise difference (exclusive or) of old and new values: exact both ways.

    Applying it to the original gives the unlearned model and applying it again gives the original
    back. Together with the unlearned model it *contains what was forgotten*: keep it as you would
    keep the original, and release `Weights`.
    """

    kind: ClassVar[str] = "delta"

    @classmethod
    def between(cls, before: nn.Module, after: nn.Module) -> Delta:
        """Collect the bit patterns in which two models of one architecture differ."""
        old, new = before.state_dict(), after.state_dict()
        return cls({
            k: _bits(old[k]) ^ _bits(new[k]) for k in old if not _same(old[k].cpu(), new[k].cpu())
        })

    def apply(self, model: nn.Module) -> nn.Module:
        """Flip the bits; twice is the identity."""
        state = model.state_dict()
        flipped = {
            k: (_bits(state[k]) ^ bits).view(state[k].dtype).reshape(state[k].shape)
            for k, bits in self.tensors.items()
        }
        _copy_into(model, flipped)
        return model

    undo = apply


@dataclass(frozen=True)
class Wrapper(Change):
    """A module around the model, whose own weights keep every bit.

    Tensors are named `NAME/tensor`, where `NAME` is an entry of `WRAPPERS`. The wrapped model still
    holds what was to be forgotten: taking the wrapper off brings all of it back.
    """

    kind: ClassVar[str] = "wrapper"

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the wrapper around `model`.

        Raises:
            ModelError: the tensors do not belong to one known wrapper.
        """
        names = {key.partition("/")[0] for key in self.tensors}
        if len(names) != 1 or not names <= set(WRAPPERS):
            raise ModelError(f"no known wrapper is made of the tensors {sorted(self.tensors)}")
        module, _, name = WRAPPERS[names.pop()].partition(":")
        values = {key.partition("/")[2]: value for key, value in self.tensors.items()}
        return getattr(importlib.import_module(module), name)(model, **values)


@dataclass(frozen=True)
class Adapter(Change):
    """Low-rank adapters on some layers of the model, whose own weights keep every bit.

    Beside the adapters' tensors it holds their configuration, as the bytes of a JSON text.
    """

    kind: ClassVar[str] = "adapter"

    def apply(self, model: nn.Module) -> nn.Module:
        """Put the adapters on `model` in place and return it."""
        return importlib.import_module("expunge.train.adapters").put_on(model, self.tensors)


@dataclass(frozen=True)
class Shards(Change):
    """The stages a sharded model serves on its backbone, whose own weights keep every bit.

    Beside the stages' tensors it holds the settings that put them together, as the bytes of a JSON text.
    """

    kind: ClassVar[str] = "shards"

    @property
    def whole(self) -> bool:
        """Whether the backbone is in it, as where training started untrained."""
        return any(name.startswith("backbone/") for name in self.tensors)

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the ensemble of the live shards on copies of `model`."""
        return importlib.import_module("expunge.exact.change").put_on(model, self.tensors)


WRAPPERS = {
    "shifted-logits": "expunge.methods.general.dm_direct:ShiftedLogits",
    "lowered-logits": "expunge.methods.text.whp:LoweredLogits",
    "corrupted-prompts": "expunge.train.corrupted_prompts:CorruptedPrompts",
    "refusing": "expunge.train.refusing:Refusing",
    "gated-adapters": "expunge.train.gated_adapters:GatedAdapters",
}
"""Modules that a `Wrapper` can put around a model: `module:class`, called with model and tensors."""
GUARDS = ("corrupted-prompts", "gated-adapters", "refusing")
"""Those that look at prompts, and can be taken off."""


def unguarded(model: nn.Module) -> nn.Module:
    """The model inside its guards, with all it knows; the model itself where there is none.

    Args:
        model: a model, guarded by entries of `GUARDS` or not; it is not changed.
    """
    guards = {WRAPPERS[name] for name in GUARDS}
    while f"{type(model).__module__}:{type(model).__qualname__}" in guards:
        model = model.get_submodule("unwrapped")
    return model


CHANGES: dict[str, type[Change]] = {c.kind: c for c in (Weights, Delta, Wrapper, Adapter, Shards)}


@dataclass
class Outcome:
    """The result of a method: a runnable model and everything a record needs.

    Attributes:
        model: the unlearned model, in eval mode; None after loading without an architecture.
        change: how it differs from the original.
        curve: one dict a recorded step of training (empty for weight edits).
        cost: what it used.
        details: settings a method derived while running (e.g. an automatic threshold) and notes.
        record: settings, seeds, hashes, versions; filled by `unlearn`.
    """

    model: nn.Module | None
    change: Change | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    details: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    problem: Problem | None = None
    request: Request | None = None

    def runnable(self) -> nn.Module:
        """Return the model.

        Raises:
            ModelError: it was loaded without an architecture.
        """
        if self.model is None:
            raise ModelError(
                "this outcome was loaded without a model; use load(path, model=original)"
            )
        return self.model

    def released(self) -> nn.Module:
        """Rebuild the model from what would be released: the change as stored, on the original.

        Audits look at this, not at the object the method may still hold.

        Raises:
            ExpungeError: the rebuilt weights differ from the model's.
        """
        import copy
        import tempfile

        if self.change is None or self.problem is None:
            return self.runnable()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "change.safetensors"
            save_file(_contiguous(self.change.tensors), path)
            change = type(self.change)(load_file(path))
        model = change.apply(copy.deepcopy(self.problem.model)).eval()
        if self.model is not None and hash_model(model) != hash_model(self.model):
            raise ExpungeError("the stored change does not rebuild the unlearned model")
        return model

    def save(self, folder: str | Path) -> Path:
        """Write `change.safetensors` and `record.json` into a folder.

        Args:
            folder: created if it is not there.

        Returns:
            The folder.

        Raises:
            ExpungeError: there is no change to save.
        """
        if self.change is None:
            raise ExpungeError("this outcome holds no change to save")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_contiguous(self.change.tensors), folder / "change.safetensors")
        record = {
            **self.record,
            "change": {"kind": self.change.kind, "hash": self.change.hash()},
            "cost": asdict(self.cost),
            "details": self.details,
            "curve": self.curve,
        }
        (folder / "record.json").write_text(json.dumps(plain(record), indent=1) + "\n")
        return folder


def load(folder: str | Path, model: nn.Module | None = None) -> Outcome:
    """Read what `Outcome.save` wrote.

    Args:
        folder: the saved folder.
        model: the original model. Not needed when the record says how to build it again.

    Returns:
        The outcome, runnable if there is a model to apply the change to.

    Raises:
        StoreError: the folder holds no outcome, or its tensors were altered.
        ModelError: `model` has other weights than the original of the record.
    """
    import copy

    folder = Path(folder)
    try:
        record = json.loads((folder / "record.json").read_text())
        tensors = load_file(folder / "change.safetensors")
        kind = CHANGES[record["change"]["kind"]]
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise StoreError(f"{folder} holds no saved outcome ({error})") from error
    change = kind(tensors)
    if change.hash() != record["change"]["hash"]:
        raise StoreError(f"{folder}/change.safetensors is not what its record describes")
    rebuilt = None
    if model is None:
        model = _rebuild(record.get("source") or {})
    if model is not None:
        wanted = record.get("fingerprint", {}).get("model")
        if wanted and not change.whole and hash_model(model) != wanted:
            raise ModelError("the given model is not the original this outcome was made from")
        rebuilt = change.apply(copy.deepcopy(model)).eval()
    return Outcome(
        rebuilt,
        change,
        curve=record.pop("curve", []),
        cost=Cost(**record.pop("cost", {})),
        details=record.pop("details", {}),
        record=record,
    )


REBUILDERS = {
    "workload": "expunge.workloads.base:original_of",
    "pruned": "expunge.workloads.base:pruned_original_of",
    "disk": "expunge.problems.models_on_disk:original_of",
    "causal-lm": "expunge.problems.lm_on_disk:original_of",
}
"""How to get an original model back from a record's `source`, by its `kind`: `module:function`."""


def _rebuild(source: Mapping[str, Any]) -> nn.Module | None:
    maker = REBUILDERS.get(str(source.get("kind")))
    if maker is None:
        return None
    module, function = maker.split(":")
    return getattr(importlib.import_module(module), function)(source)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}


@torch.no_grad()
def _copy_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    state = model.state_dict()
    unknown = sorted(set(tensors) - set(state))
    if unknown:
        raise ModelError(f"the model has no tensor {unknown[0]!r}; is it the right architecture?")
    for name, value in tensors.items():
        if state[name].shape != value.shape:
            raise ModelError(
                f"tensor {name!r} has shape {tuple(value.shape)}, the model's has {tuple(state[name].shape)}"
            )
        state[name].copy_(value)
