r"""LAF: move the representation of the forget data away, with no label of any sample.

Two VAEs model what the original network sees before its last layer, \(e_0(x)\): h that of the training
data, q that of \(D_f\). Then two optimisers take turns on a pair of batches, with
\(\varphi(m) = e^{m/(m+1)}\), \(c = 1 - \cos(e, e_0)\) on retain rows and \(c'\) the same on forget rows:

\[ L_{UE} = \sum_{B_r} \varphi(\|h(e) - e\|^2) - \sum_{B_f} \varphi(\|q(e) - e\|^2), \qquad
   L_{RA} = \sum_{B_r} c_i - |B_r| \log \sum_{B_f} e^{c'_j / \tau} . \]

With `repair` (LAF+R) the last layer is then trained on some labelled retain samples.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from expunge.core.data import Batch
from expunge.core.errors import NeedsError, SettingError
from expunge.core.needs import Card, Deviation, Labels, Needs
from expunge.core.outcome import Outcome
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime, random_restored
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train.features import Features, original_features
from expunge.train.fit import Pass
from expunge.train.masks import Mask, only
from expunge.train.method import Training
from expunge.train.norm import NormMode
from expunge.train.stages import Stages
from expunge.train.steps import StepName
from expunge.train.vae import VAE, Decoder, vae_loss

_TEST = "tests/methods/test_laf.py::test_laf_"


@dataclass(frozen=True, kw_only=True)
class LAF(Training):
    """Label-agnostic forgetting: retain features stay explained, forget features do not."""

    name: ClassVar[str] = "laf"
    search: ClassVar = {"epochs": None, "lr": None, "lr_alignment": None}
    card: ClassVar[Card] = Card(
        title="Label-Agnostic Forgetting: A Supervision-Free Unlearning in Deep Models",
        authors="Shaofei Shen, Chenhao Zhang, Yawen Zhao, Alina Bialkowski, Weitong Chen, Miao Xu",
        year=2024,
        link="https://arxiv.org/abs/2404.00506",
        idea="Leave what models the forget features, stay with what models the rest; no labels.",
        deviations=(
            Deviation(
                "The first VAE learns all training features, as in the released code; the paper "
                "speaks of the remaining data (remain_vae=retain).",
                _TEST + "first_vae_learns_what_it_is_told",
            ),
            Deviation(
                "The representation is whatever the last layer reads; the paper's networks have a "
                "linear layer of 256 there, without ReLU.",
                _TEST + "invariant_3_alignment_at_the_start",
            ),
            Deviation(
                "How LAF+R repairs is not known in full; here Adam trains the last layer alone, one "
                "pass over a tenth of the retain data if repair=0.1.",
                _TEST + "invariant_6_repair_touches_the_head_only",
            ),
        ),
    )

    epochs: int = setting(20, "passes over the shorter of both sides", low=1, source="code, MNIST")
    lr: float = setting(5e-5, "learning rate of L_UE", low=0, source="code, MNIST")
    lr_alignment: float = setting(1e-4, "learning rate of L_RA", low=0, source="code, MNIST")
    temperature: float = setting(20.0, "τ of the push on forget rows", above=0, source="code, class removal")  # fmt: skip
    batch_size: int = setting(32, "samples of each side a step", low=1, source="code")
    step: StepName = setting("adam", "optimiser of both: sgd, adam or adamw", source="code")
    norm: NormMode = setting("frozen", "running statistics: train, frozen or recalibrate", source="code")  # fmt: skip
    latent: int = setting(8, "dimensions of the VAEs' latent", low=1, source="code; 16 for CIFAR-10")  # fmt: skip
    decoder: Decoder = setting("sigmoid", "output of the VAEs: sigmoid (0 … 1) or linear", source="code")  # fmt: skip
    vae_epochs: int = setting(10, "passes of each VAE over its features", low=1, source="code")
    vae_lr: float = setting(1e-3, "Adam's learning rate for the VAEs", above=0, source="code")
    kl_weight: float = setting(0.025, "weight of the divergence in the VAEs' loss", low=0, source="code")  # fmt: skip
    remain_vae: Literal["all", "retain"] = setting("all", "data of the first VAE", source="code")
    repair: float = setting(0.0, "LAF+R: share of labelled retain data for the last layer; 0: none", low=0, high=1)  # fmt: skip
    repair_epochs: int = setting(1, "passes of the repair", low=1)
    repair_lr: float = setting(1e-3, "Adam's learning rate of the repair", above=0)

    @property
    def needs(self) -> Needs:
        """Inputs of both sides; labels only for the repair or a saliency mask."""
        salient, repair = self.reads_forget_labels(), self.repair > 0
        labels: Labels = "retain" if repair else "none"
        if salient:
            labels = "all" if repair else "forget"
        return Needs(
            forget=True, retain=True, labels=labels, original=True,
            capabilities=frozenset({"penultimate"}),
        )  # fmt: skip

    def check(self, problem: Problem, request: Request) -> None:
        """Also complain about a model that is its last layer and nothing else."""
        super().check(problem, request)
        last = tuple(f"{name}." for name in problem.role("last layer"))
        if all(name.startswith(last) for name, _ in problem.model.named_parameters()):
            raise NeedsError("laf trains what is before the last layer; the model has only that")

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Fit both VAEs, take turns, and repair if asked to."""
        if runtime.processes > 1:
            raise NeedsError("laf contrasts whole batches and runs in one process")
        stages = Stages(self, view.model(), view, runtime)
        head = self._head(stages, view) if self.repair else {}
        known = original_features(view)
        retain = view.everything if self.remain_vae == "all" else view.retain
        h = self._vae(stages, "laf retain vae", known, retain.ids, runtime)
        q = self._vae(stages, "laf forget vae", known, view.forget.ids, runtime)
        vae_steps = stages.steps
        stages.run(
            "laf", functools.partial(self._turns, h, q, known, view, runtime), epochs=self.epochs,
            turns=(self.lr, self.lr_alignment), every=9,  # odd: both losses show in the curve
        )  # fmt: skip
        steps = stages.steps - vae_steps
        if self.repair:
            self._repair(stages, head, view, runtime)
        empty = float((known.values == 0).all(1).float().mean())  # their cosine means nothing
        return stages.outcome(vae_steps=vae_steps, unlearning_steps=steps, zero_features=empty)

    def _vae(
        self, stages: Stages, name: str, known: Features, ids: Tensor, runtime: Runtime
    ) -> VAE:
        """A VAE of the original's features of some samples, trained and frozen."""
        with random_restored():
            torch.manual_seed(runtime.seed_for(name))
            vae = VAE(known.values.shape[1], self.latent, self.decoder)

        def loss(vae: nn.Module, batch: Batch) -> Tensor:
            return vae_loss(vae, batch.x["features"], batch.x["noise"], self.kl_weight)

        def passes(epoch: int) -> Pass:
            order = ids[torch.randperm(len(ids), generator=runtime.generator(name, epoch))]
            for index, chunk in enumerate(order.split(self.batch_size)):
                noise = self._noise(len(chunk), runtime, name, epoch, index)
                x = {"features": known.of(chunk).to(noise), "noise": noise}
                yield loss, Batch(x, None, chunk, len(chunk))

        stages.run(
            name, passes, epochs=self.vae_epochs, model=vae.to(runtime.device), lr=self.vae_lr,
            step="adam", momentum=0.0, weight_decay=0.0, norm="frozen",
        )  # fmt: skip
        return vae.eval().requires_grad_(False)

    def _turns(
        self, h: VAE, q: VAE, known: Features, view: View, runtime: Runtime, epoch: int
    ) -> Pass:
        """For each pair of batches a step away by the VAEs, then one of alignment."""

        def extract(model: nn.Module, pair: tuple[Batch, Batch], noise: list[Tensor]) -> Tensor:
            kept, gone = self._features(view, model, pair)
            return extractor_loss(h.errors(kept, noise[0]), q.errors(gone, noise[1]))

        def align(model: nn.Module, pair: tuple[Batch, Batch]) -> Tensor:
            distances = [
                1 - cosine_similarity(e, known.of(batch.ids).to(e))
                for e, batch in zip(self._features(view, model, pair), pair, strict=True)
            ]
            return alignment_loss(distances[0], distances[1], self.temperature)

        for index, pair in enumerate(self.pairs(view, runtime, epoch)):
            noise = [
                self._noise(len(b), runtime, side, epoch, index)
                for b, side in zip(pair, ("retain", "forget"), strict=True)
            ]
            yield functools.partial(extract, noise=noise), pair
            yield align, pair

    def pairs(self, view: View, runtime: Runtime, epoch: int) -> Iterator[tuple[Batch, Batch]]:
        """Pairs of a retain and a forget batch, until the shorter side ends."""
        kept = view.retain.batches(self.batch_size, runtime.generator("retain", epoch))
        gone = view.forget.batches(self.batch_size, runtime.generator("forget", epoch))
        return zip(kept, gone, strict=False)

    def _features(
        self, view: View, model: nn.Module, pair: tuple[Batch, Batch]
    ) -> tuple[Tensor, Tensor]:
        if self.norm != "train":
            model.eval()  # as in the released code: no dropout either
        kept, gone = (view.penultimate(model, batch).float() for batch in pair)
        if not kept.requires_grad:
            raise SettingError(
                f"LAF: train={self.train} freezes all that comes before the last layer, and only that "
                "is trained; let more of it move"
            )
        return kept, gone

    def _noise(self, count: int, runtime: Runtime, *stage: str | int) -> Tensor:
        generator = runtime.generator("noise", *stage)
        return torch.randn(count, self.latent, generator=generator).to(runtime.device)

    def _head(self, stages: Stages, view: View) -> Mask:
        """What the repair moves: the last layer, as far as it may move.

        Raises:
            SettingError: nothing of it may; better said before all the training than after it.
        """
        mask = only(stages.model, view.role("last layer"))
        if stages.mask is not None:
            mask = {n: m & stages.mask[n] for n, m in mask.items()}
        if not any(p.requires_grad and mask[n].any() for n, p in stages.model.named_parameters()):
            raise SettingError(
                f"LAF: repair={self.repair:g} trains the last layer, and train={self.train} and the "
                "model together freeze it; let it move, or use repair=0"
            )
        return mask

    def _repair(self, stages: Stages, mask: Mask, view: View, runtime: Runtime) -> None:
        """Cross-entropy on some retain samples; only the last layer moves."""
        count = max(1, round(self.repair * len(view.retain)))
        kept = view.retain.part(count, runtime.generator("repair"))

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return batch.mean(view.each_loss(model, batch))

        def passes(epoch: int) -> Pass:
            for batch in kept.batches(self.batch_size, runtime.generator("repair", epoch)):
                yield loss, batch

        stages.run(
            "laf repair", passes, epochs=self.repair_epochs, lr=self.repair_lr, step="adam",
            mask=mask, norm="frozen",
        )  # fmt: skip


def extractor_loss(kept: Tensor, gone: Tensor) -> Tensor:
    r"""\(L_{UE}\) of squared errors of retain and of forget rows; sums, each term from 1 to below e."""
    return bounded(kept).sum() - bounded(gone).sum()


def bounded(errors: Tensor) -> Tensor:
    r"""\(\varphi(m) = e^{m/(m+1)}\), written so that a huge m gives e and not NaN."""
    return (1 - 1 / (errors + 1)).exp()


def alignment_loss(kept: Tensor, gone: Tensor, temperature: float) -> Tensor:
    r"""\(L_{RA}\) of cosine distances; at the original \(-|B_r| \log |B_f|\) for every τ."""
    return kept.sum() - len(kept) * (gone / temperature).logsumexp(0)
