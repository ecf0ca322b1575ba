"""KLoM as an audit: are the margins of unlearned models distributed as those of retrained ones?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from expunge.audits._intervals import mean_interval
from expunge.audits._klom import DEFINITION, Array, klom, margins
from expunge.audits._splits import FEWEST, NO_REFERENCE, SPLITS, one_class, unusable
from expunge.core.audit import Audit, Finding, Subject
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting

_TEST = "tests/audits/test_klom_audit.py::test_"


@dataclass(frozen=True)
class KLoM(Audit):
    r"""Per sample \(\mathrm{KL}(\text{unlearned} \,\|\, \text{retrained})\) of the margins over many models.

    A model is one margin a sample, and one number is no distribution: the audit is of a *method*, run with
    several seeds, and takes the models of the other seeds from `Subject.siblings`. The references
    are halved: one half is compared with, the other is what other retrained models reach, the floor;
    as many unlearned models as that half has are counted, since KLoM grows as models get fewer. The value
    is the mean over a split's samples, in nats, 0 to 11.5; with its 95th percentile and histogram.
    """

    name: ClassVar[str] = "klom"
    domain: ClassVar[str] = "classification"
    card: ClassVar[Card] = Card(
        title="Attribute-to-Delete: Machine Unlearning via Datamodel Matching",
        authors="Georgiev, Rinberg, Park, Garg, Ilyas, Madry, Neel",
        year=2024,
        link="https://arxiv.org/abs/2410.23232",
        idea="Divergence of the margins of unlearned models from those of retrained ones, sample by sample.",
        intent="measurement",
        fidelity="variant",
        deviations=(
            Deviation(
                "Value and floor count equally many models against the same retrained ones.",
                _TEST + "value_and_floor_count_equally_many_models",
            ),
        ),
    )

    fewest: int = setting(
        10, "models a side below which a histogram of 20 bins says nothing", low=5
    )

    @property
    def needs(self) -> Needs:
        """Labels and logits, and twice as many references as models a side."""
        return Needs(
            forget=True, retain=True, labels="all", models=2 * self.fewest,
            capabilities=frozenset({"logits"}),
        )  # fmt: skip

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """A finding for each split."""
        unlearned = [subject, *subject.siblings]
        half = len(references) // 2
        count = min(len(unlearned), half)
        found = []
        for split in SPLITS:
            name = f"{self.name}/{split}"
            why = self._why(unlearned, references, split)
            if why:
                found.append(Finding(name, None, "down", reason=why))
                continue
            mine, theirs = (_margins(models, split) for models in (unlearned, references))
            made = _finding(name, mine[:count], theirs[:half], theirs[half : half + count])
            if made.value is not None and subject.siblings:
                made = replace(made, reason=ONE_ORIGINAL)
            found.append(made)
        return found

    def _why(
        self, unlearned: Sequence[Subject], references: Sequence[Subject], split: str
    ) -> str | None:
        if not references:
            return NO_REFERENCE
        if len(unlearned) == 1:
            return (
                "one model is no distribution: KLoM compares a method's models of several seeds, "
                f"at least {self.fewest}"
            )
        if len(unlearned) < self.fewest:
            return f"only {len(unlearned)} unlearned models, {self.fewest} are needed"
        if len(references) < 2 * self.fewest:
            return (
                f"only {len(references)} references, {2 * self.fewest} are needed: "
                "half to compare with, half for the floor"
            )
        why = unusable([*unlearned, *references], split)
        if why:
            return why
        if len(unlearned[0].splits[split]) < FEWEST:
            return f"only {len(unlearned[0].splits[split])} samples, {FEWEST} are needed"
        return one_class(unlearned[0])


ONE_ORIGINAL = (
    "all models started from one original, where the paper starts each from another: what that original "
    "has of chance stays in all of them, so even a perfect method can lie above the floor"
)


def _margins(models: Sequence[Subject], split: str) -> Array:
    """Margins [models, samples]."""
    return margins(torch.stack([m.logits(split) for m in models]), models[0].labels(split))


def _finding(name: str, mine: Array, oracles: Array, others: Array) -> Finding:
    if float(np.ptp(np.concatenate([mine, oracles, others]), axis=0).max()) < 1e-9:
        same = "all models give every sample the same margin: nothing varies with the seed"
        return Finding(name, None, "down", reason=same)
    values, floor = klom(mine, oracles), klom(others, oracles)
    edges = np.linspace(0, -np.log(DEFINITION.epsilon), 31)
    low, high = mean_interval(values)
    return Finding(
        name,
        float(values.mean()),
        "down",
        low=low,
        high=high,
        reference=float(floor.mean()),
        detail={
            "p95": float(np.percentile(values, 95)),
            "floor_p95": float(np.percentile(floor, 95)),
            "models": len(mine),
            "oracles": len(oracles),
            "definition": asdict(DEFINITION),
            "histogram": {
                "edges": edges.tolist(),
                "unlearned": _shares(values, edges),
                "floor": _shares(floor, edges),
            },
        },
        per_sample={"klom": values, "floor": floor},
    )


def _shares(values: Array, edges: Array) -> list[float]:
    inside = np.clip(values, edges[0], edges[-1])
    shares: list[float] = (np.histogram(inside, edges)[0] / len(values)).tolist()
    return shares
