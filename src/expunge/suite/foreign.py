"""Audit a model that somebody else unlearned: nothing is believed but the artefact."""

from __future__ import annotations

import copy
import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from expunge import __version__
from expunge.core.audit import Audit, Finding, Subject
from expunge.core.errors import ExpungeError, ModelError
from expunge.core.hashing import content_key, hash_model, hash_tensors
from expunge.core.method import package_versions
from expunge.core.outcome import load
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.store import Store
from expunge.suite.bench import Bench

KIND = "artefact"
"""Of runs that were made elsewhere."""


def read_artefact(path: str | Path, problem: Problem) -> nn.Module:
    """Read a released model.

    Args:
        path: `.safetensors` with weights for the problem's network; a folder in the format of
            `transformers`; or a folder that `Outcome.save` wrote, whose change is applied to the
            problem's original and whose record is not believed.
        problem: what it is to be a model of.

    Returns:
        The model in eval mode.

    Raises:
        ModelError: there is no model that can be read, or its weights do not fit.
        StoreError: a saved outcome is damaged.
    """
    place = Path(path).expanduser()
    if place.suffix == ".safetensors" and place.is_file():
        return _weights(place, problem)
    if (place / "change.safetensors").is_file():
        change = load(place, copy.deepcopy(problem.model)).change
        assert change is not None
        return change.apply(copy.deepcopy(problem.model)).eval()
    if not place.exists():
        raise ModelError(
            f"there is no {path}; give a .safetensors file of weights, a folder of transformers, or one "
            "that expunge saved"
        )
    if problem.kind == "causal-lm":
        from expunge.problems.lm_on_disk import load_lm

        return load_lm(str(place))[0].eval()
    from expunge.problems.models_on_disk import load_image_classifier

    return load_image_classifier(str(place)).eval()


def _weights(place: Path, problem: Problem) -> nn.Module:
    model = copy.deepcopy(problem.model)
    try:
        tensors = load_file(place)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{place} cannot be read as safetensors ({error})") from error
    there = model.state_dict()
    for name in there.keys() - tensors.keys():  # tied weights are written once
        same = [
            n
            for n in tensors.keys() & there.keys()
            if there[n].data_ptr() == there[name].data_ptr()
        ]
        if same and there[name].numel():
            tensors[name] = tensors[same[0]]
    lacking = sorted(there.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - there.keys())
    other = sorted(
        n for n in there.keys() & tensors.keys() if there[n].shape != tensors[n].shape
    )  # fmt: skip
    for names, why in ((lacking, "are missing"), (unknown, "are not the model's"), (other, "have another shape")):  # fmt: skip
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelError(f"{place}: weights {why}: {names[0]}{more}")
    model.load_state_dict(tensors)
    return model.eval()


def audit_model(
    model: nn.Module | str | Path,
    problem: Problem,
    request: Request,
    audits: str | Sequence[str | Audit] = "standard",
    *,
    references: int = 3,
    strata: Any = None,
    store: Store | None = None,
    runtime: Runtime | None = None,
) -> list[Finding]:
    """Audit a model that was unlearned elsewhere against retrained references of one's own.

    Args:
        model: the released model, or where it lies (see `read_artefact`).
        problem: the original model, its data and how it was trained.
        request: what the model is said to have forgotten.
        audits: a suite's name or a list.
        references: how many to retrain.
        strata: a score's name, a `Difficulty`, or ids by name of the part; see `compare`.
        store: where references and findings are kept; a temporary one by default.
        runtime: device, threads, progress.

    Returns:
        The findings. What rests on how the model was made (cost, method) says that it is not known.

    Raises:
        ModelError: the model cannot be read or does not take the problem's data.
    """
    released = model if isinstance(model, nn.Module) else read_artefact(model, problem)
    bench = Bench(store or Store.temporary(), runtime or Runtime())
    _check(released, problem, bench.runtime)
    problem.check()
    parts = bench.strata(problem, strata)
    ready = bench.references(problem, request, references)
    beside = [(r, Subject(r.model, problem, request, bench.runtime, cost=r.cost)) for r in ready]
    subject = Subject(released, problem, request, bench.runtime)
    weights = hash_model(subject.model)
    record = {
        "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "problem": problem.name,
        "source": problem.source,
        "fingerprint": problem.fingerprint(),
        "request": request.to_dict(),
        "artefact": None if isinstance(model, nn.Module) else str(model),
        "weights": weights,
        "packages": package_versions(),
    }
    # a wrapper can behave otherwise with the same weights
    said = hash_tensors({s: _losses(subject, s) for s in subject.splits})
    key = content_key(
        [KIND, __version__, weights, str(released), said, problem.fingerprint(), request.to_dict()]
    )  # fmt: skip
    run = bench.store.put_run(kind=KIND, key=key, record=record, parents=[bench.original(problem)])
    return bench.audit(subject, run, beside, audits, parts)


ASKED = 4096
"""Samples of a split whose losses say how the model behaves."""


@torch.no_grad()
def _losses(subject: Subject, split: str) -> Tensor:
    """The model's loss [n] on the first samples of a split; empty where nothing is labelled."""
    data, device = subject.data_of(split), subject.runtime.device
    if not data.labelled:
        return torch.empty(0)
    parts = [
        subject.problem.each_loss(subject.model, batch.to(device)).float().cpu()
        for batch in data.batches(256, subject.splits[split][:ASKED])
    ]
    return torch.cat(parts) if parts else torch.empty(0)


def _check(model: nn.Module, problem: Problem, runtime: Runtime) -> None:
    """Ask the model about two samples."""
    asked = copy.deepcopy(model).to(runtime.device).eval()
    batch = problem.train.fetch(problem.train.ids[:2]).to(runtime.device)
    try:
        with torch.no_grad():
            losses = problem.each_loss(asked, batch)
    except ExpungeError:
        raise
    except Exception as error:
        raise ModelError(f"the model does not take the problem's data: {error}") from error
    if losses.shape != (len(batch),):
        raise ModelError("the model's outputs are not those of this problem")
    if problem.kind == "classification":
        logits = problem.capability("logits")
        with torch.no_grad():
            theirs = logits(asked, batch).shape[1]
            own = logits(copy.deepcopy(problem.model).to(runtime.device).eval(), batch).shape[1]
        if theirs != own:
            raise ModelError(f"the model has {theirs} outputs, the original {own}")
