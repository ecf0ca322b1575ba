r"""Influence: move the weights to where they would be had the forget data had no weight.

\(\theta' = \theta + \alpha F^{-1} v\), \(v = \frac1N \sum_{D_f} \nabla\ell - \frac{N_f}{N N_r} \sum_{D_r} \nabla\ell\): the first
order of giving the forget samples weight 0 and the others \(1/N_r\) instead of \(1/N\) each. \(F\) is the
empirical Fisher of K retain samples, in place of the Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import ExpungeError
from expunge.core.method import Method
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.curvature import woodfisher
from expunge.curvature.fisher import mean_gradient
from expunge.curvature.per_sample import default_chunk

_TEST = "tests/methods/test_sparse_unlearn.py::test_sparse_unlearn_"


@dataclass(frozen=True, kw_only=True)
class Influence(Method):
    """Influence unlearning with WoodFisher; one step, no training.

    `mode="exact"` solves with the inverse Fisher by the Woodbury identity, keeping K gradients in
    memory. `mode="official"` is the released code's recursion, which is close to a plain step along
    v. Running statistics stay. Requests in sequence are steps added up, each from where the last
    one ended; their errors add up too.
    """

    name: ClassVar[str] = "influence"
    search: ClassVar = {"damping": None}
    card: ClassVar[Card] = Card(
        title="Model Sparsity Can Simplify Machine Unlearning",
        authors="Jia, Liu, Ram, Yao, Liu, Liu, Sharma, Liu",
        year=2023,
        link="https://arxiv.org/abs/2304.04934",
        idea="Take the first-order step that removes the weight of the forget data.",
        fidelity="variant",
        deviations=(
            Deviation(
                "The inverse Fisher is solved exactly; the released recursion only subtracts a "
                "multiple of one gradient and is mode=official.",
                _TEST + "invariant_4_official_mode_is_no_inverse",
            ),
            Deviation(
                "The K retain samples are drawn at random; mode=official takes them in the order of "
                "their ids, as the released code takes them in file order.",
                _TEST + "influence_draws_its_samples",
            ),
        ),
    )

    alpha: float = setting(1.0, "length of the step, α", low=0, source="theory")
    damping: float = setting(0.01, "λ added to the Fisher's diagonal", above=0, source="measured")
    samples: int = setting(256, "retain samples in the Fisher, K", low=1, source="measured")
    mode: Literal["exact", "official"] = setting(
        "exact", "exact inverse, or the released code's recursion"
    )
    scale: int = setting(
        1000, "N₀ of mode=official: divisor, and number of samples", low=1, source="code"
    )
    batch_size: int = setting(128, "samples a batch for the two mean gradients", low=1)

    @property
    def needs(self) -> Needs:
        """Both sides with labels, and gradients of single samples."""
        return Needs(forget=True, retain=True, labels="all", per_sample_grad=True)

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Take the step."""
        model = view.model()
        v = direction(model, view, runtime, self.batch_size)
        source = view.retain
        if self.mode == "exact":
            source = source.part(self.samples, runtime.generator(self.name, "fisher"))
        ids = source.ids[: self.scale] if self.mode == "official" else source.ids
        rows = whole_rows(model, view, source.fetch, ids, v, runtime)
        if self.mode == "official":
            flowing = (row for chunk in rows for row in chunk)
            product = woodfisher.rescaled_recursion(flowing, v, self.scale)
        else:
            product = woodfisher.solve(torch.cat(list(rows)), v, self.damping)
        step = self.alpha * product
        if not bool(step.isfinite().all()):
            raise ExpungeError("influence: the step is NaN or infinite; lower alpha, raise damping")
        woodfisher.add_flat(model, step)
        details: dict[str, Any] = {
            "samples": len(ids),
            "step_norm": float(step.norm()),
            "cosine": float(torch.cosine_similarity(product.double(), v.double(), dim=0)),
            "norm": "frozen",
        }
        return Outcome(model, details=details)


def whole_rows(
    model: nn.Module,
    view: View,
    fetch: Callable[[Tensor], Batch],
    ids: Tensor,
    like: Tensor,
    runtime: Runtime,
) -> Iterator[Tensor]:
    """Yield gradients [B, P] of samples in the order of `ids`, the same in every process.

    Each process computes its share, but the product with the inverse needs the rows of all.

    Args:
        model: the model.
        view: gives the loss.
        fetch: reads samples by id, this process' share of them.
        ids: of the samples.
        like: a vector [P] of the dtype the rows are put together in.
        runtime: counts gradients, and puts the processes' rows together.
    """
    chunks = ids.split(runtime.chunk or default_chunk(model))
    if runtime.processes == 1:
        runtime.cost.gradients += len(ids)
        yield from woodfisher.gradient_rows(model, view.each_loss, map(fetch, chunks))
        return
    for chunk in chunks:
        batch, rows = fetch(chunk), like.new_zeros(len(chunk), len(like))
        if len(batch):
            own = next(woodfisher.gradient_rows(model, view.each_loss, [batch]))
            rows[runtime.rank :: runtime.processes] = own
        runtime.cost.gradients += len(batch)
        yield runtime.sum(rows)


def direction(model: nn.Module, view: View, runtime: Runtime, batch_size: int) -> Tensor:
    r"""\(v = \frac{N_f}{N}\,(\nabla \bar L_f - \nabla \bar L_r)\) [P], in eval mode; 0 where the means agree."""
    sides = [
        mean_gradient(model, view.each_loss, source, runtime, batch_size=batch_size).values
        for source in (view.forget, view.retain)
    ]
    forget, retain = (woodfisher.flat(model, side) for side in sides)
    return (forget - retain) * (view.forget_count / view.total_count)
