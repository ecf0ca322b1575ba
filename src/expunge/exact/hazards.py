"""What would make deletion inexact although every stage is trained on its slices alone.

Some of it shows in the problem, some only its owner knows and declares. What breaks exactness is refused
unless it is accepted by name; then the manifest says so, and the model no longer calls itself exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from expunge.core.errors import NeedsError, SettingError
from expunge.core.problem import Problem
from expunge.exact.index import Index
from expunge.exact.settings import Settings

KNOWN = (
    "normaliser",
    "tokenizer",
    "deduplication",
    "hyper-parameters",
    "early stopping",
    "average",
)
"""What an owner may declare to come from `public` data or from the `data` that is subject to deletion."""

_WORDS = {
    "normaliser": "means, scales or vocabularies were fitted on samples that may be deleted",
    "tokenizer": "its vocabulary was fitted on samples that may be deleted",
    "deduplication": "which samples are there depends on others that may be deleted",
    "hyper-parameters": "they were chosen by scores on samples that may be deleted",
    "early stopping": "the number of steps was chosen by scores on samples that may be deleted",
    "average": "averaged weights (EMA, SWA) mix stages before and after a sample was seen",
    "backbone": (
        "the problem has a recipe, so its model was trained on the data that may be deleted; pass a "
        "problem whose model never saw it, without recipe=, or start='fresh'"
    ),
    "validation": "validation samples, which decide between stages, are in the training data too",
}


@dataclass(frozen=True)
class Hazards:
    """What was found.

    Attributes:
        breaks: what breaks exactness and was accepted, by name.
        warnings: sentences about what nobody can check here.
    """

    breaks: dict[str, str]
    warnings: tuple[str, ...]


def inspect(
    problem: Problem,
    settings: Settings,
    *,
    fitted: Mapping[str, str],
    accept: Collection[str],
    samples: Mapping[int, str],
    held_out: Collection[str],
    index: Index,
) -> Hazards:
    """Look for what breaks exactness.

    Args:
        problem: what is trained.
        settings: how.
        fitted: what the owner declares: a name of `KNOWN` to `public` or `data`.
        accept: names of what is to be put up with.
        samples: digest of each training sample by id.
        held_out: digests of the validation samples.
        index: where the samples lie.

    Returns:
        What was accepted, and warnings.

    Raises:
        SettingError: something unknown is declared or accepted.
        NeedsError: exactness would be broken by what was not accepted.
    """
    for name, source in fitted.items():
        if name not in KNOWN or source not in ("public", "data"):
            raise SettingError(
                f"fitted={{{name!r}: {source!r}}}: names are {', '.join(KNOWN)}; sources public or data"
            )
    unknown = set(accept) - _WORDS.keys()
    if unknown:
        raise SettingError(f"accept: there is no {min(unknown)!r}; there are {', '.join(_WORDS)}")
    found = {name for name, source in fitted.items() if source == "data"}
    if settings.start == "model" and problem.recipe is not None:
        found.add("backbone")
    if isinstance(problem.model, torch.optim.swa_utils.AveragedModel):
        found.add("average")
    if not set(samples.values()).isdisjoint(held_out):
        found.add("validation")
    for name in sorted(found - set(accept)):
        raise _refused(name, f"accept=[{name!r}] goes on and says so in the manifest")
    return Hazards(
        {name: _WORDS[name] for name in sorted(found)},
        tuple(_warnings(problem, settings, fitted, samples, index)),
    )


def inspect_again(
    breaks: Collection[str], samples: Mapping[int, str], held_out: Collection[str]
) -> None:
    """Look at the data that a model is retrained with, which may be other than it was trained with.

    Args:
        breaks: what was accepted in training.
        samples: digest of each training sample by id.
        held_out: digests of the validation samples.

    Raises:
        NeedsError: its validation data are training data too, which nobody accepted.
    """
    if "validation" not in breaks and not set(samples.values()).isdisjoint(held_out):
        raise _refused("validation", "retrain with a problem whose valid= is apart from the data")


def _refused(name: str, way_out: str) -> NeedsError:
    return NeedsError(
        f"deletion would not be exact because of the {name}: {_WORDS[name]}; {way_out}"
    )


def _warnings(
    problem: Problem,
    settings: Settings,
    fitted: Mapping[str, str],
    samples: Mapping[int, str],
    index: Index,
) -> list[str]:
    said = []
    if getattr(problem, "tokenizer", None) is not None and "tokenizer" not in fitted:
        said.append("nobody said what the tokenizer was fitted on; declare fitted={'tokenizer': …}")
    if settings.start == "model":
        said.append(
            "that the backbone never saw the training data is the owner's word; its hash is recorded"
        )
    places = {i: (s, j) for i, s, j in zip(index.ids.tolist(), index.shard.tolist(), index.piece.tolist(), strict=True)}  # fmt: skip
    apart = Counter(digest for digest, _ in {(d, places[i]) for i, d in samples.items()})
    copies = sum(n > 1 for n in apart.values())
    if copies:
        said.append(
            f"{copies} samples have copies in other slices under other ids; deleting one id does not "
            "delete its copies"
        )
    return said
