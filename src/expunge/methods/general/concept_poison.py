r"""ConceptPoison: paste another class over the concept that carries a class, and train on that.

Each forget image gets a patch of an image of the donor class where the concept of its own class is,
and a new label \(y'\); then the last layer minimises \(\mathrm{CE}\) on the retain data and the
poisoned copies together. The concept is a direction \(v\) in the model's feature space; it is where
\(\cos(\varphi(\mathrm{window}), v)\) is largest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from expunge.analysis.concepts import class_concepts, load_bank
from expunge.analysis.patches import Windows, concept_centres, resized
from expunge.core.data import Batch
from expunge.core.errors import SettingError
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.outcome import Outcome
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train import poison as parts
from expunge.train.fit import Pass
from expunge.train.method import Training
from expunge.train.norm import NormMode
from expunge.train.poison import Labeller, Poison, gathered, images_of
from expunge.train.relabel import merged_by

_TESTS = "tests/methods/test_concept_poison.py::test_concept_poison_"
SIZES = {"localized": 64 / 224, "center": 96 / 224, "random": 96 / 224, "full": 160 / 224}
"""Side of what is pasted, as a share of the image's shorter side."""
EXAMPLES = 100
"""Samples of each class that concepts are found with."""


@dataclass(frozen=True, kw_only=True)
class ConceptPoison(Training):
    """Poisoner × labeller: where a patch of the donor class goes, and which label the copy gets.

    The next request starts from the weights this one left, with concepts found in them anew.
    """

    name: ClassVar[str] = "concept-poison"
    card: ClassVar[Card] = Card(
        title="Class Machine Unlearning for Complex Data via Concepts Inference and Data Poisoning",
        authors="Chang, Zhu, Xu, Liu, Zhou",
        year=2024,
        link="https://arxiv.org/abs/2405.15662",
        idea="Overwrite the concept a class rests on with another class, and relabel.",
        intent="suppression",
        fidelity="variant",
        deviations=(
            Deviation(
                "Windows are encoded by the model's own penultimate features, not by CLIP; without "
                "a concept bank the concept of a class is the normal of a linear SVM between its "
                "samples and others.",
                _TESTS + "finds_the_concept_with_its_own_features",
            ),
            Deviation(
                "Running statistics stay frozen with the backbone; the released code lets them move.",
                _TESTS + "invariant_5_the_backbone_is_identical_to_the_bit",
            ),
            Deviation(
                "Sizes are shares of the image (64, 96 and 160 of 224 pixels), images keep their "
                "size, and copies are not compressed.",
                _TESTS + "sizes_are_shares_of_the_image",
            ),
            Deviation(
                "The donor class, where none is given, is the one the original model confuses the "
                "class with most; the paper lists one by hand for each class.",
                _TESTS + "donor_is_the_most_confused_class",
            ),
        ),
    )

    epochs: int = setting(20, "passes over both sides", low=1, source="released code")
    lr: float = setting(1e-3, "learning rate", above=0, source="released code")
    batch_size: int = setting(32, "samples a batch", low=1, source="released code")
    train: str = setting(
        "role(last layer)", "weights that move; the last layer only", source="released code"
    )
    norm: NormMode = setting("frozen", "running statistics: frozen, train or recalibrate")
    poisoner: Literal["localized", "center", "random", "full", "none"] = setting(
        "localized", "where the donor's patch goes; full: the whole donor image", source="paper"
    )
    labeller: Labeller = setting("targeted", "label of a copy; targeted: donor", source="paper")
    donor: int | None = setting(None, "donor class; none: the most confused one", low=0)
    bank: str | None = setting(None, "file of concept vectors in the penultimate space; none: CAVs")
    concept: str | None = setting(None, "concept of the bank to overwrite; none: the top ones")
    donor_concept: str | None = setting(None, "concept of the bank to paste; none: the top ones")
    top: int = setting(1, "patches an image, one a concept of the bank, M", low=1, source="paper")
    window: float = setting(
        64 / 224, "side of a window, share of the image", above=0, high=1, source="released code"
    )
    stride: float = setting(
        16 / 224,
        "step between windows, share of the image",
        above=0,
        high=1,
        source="released code",
    )
    size: float | None = setting(
        None, "side of what is pasted, share of the image; none: by poisoner", above=0, high=1
    )

    def __post_init__(self) -> None:
        """Check the settings; raises `SettingError` also for concepts without a bank."""
        super().__post_init__()
        if self.bank is None and (self.concept or self.donor_concept or self.top > 1):
            raise SettingError("concepts are chosen from a bank; pass bank= with them")

    @property
    def needs(self) -> Needs:
        """Both sides with labels; random labels alone do not read those of the forget side."""
        blind = self.labeller == "random" and self.poisoner == "none"
        logits = self.labeller == "second-best" or (self._donates and self.donor is None)
        return Needs(
            forget=True,
            retain=True,
            labels="retain" if blind and not self.reads_forget_labels() else "all",
            capabilities=frozenset(
                (["logits"] if logits else [])
                + (["penultimate"] if self.poisoner not in ("none", "full") else [])
            ),
        )

    @property
    def _donates(self) -> bool:
        return self.labeller == "targeted" or self.poisoner != "none"

    def check(self, problem: Problem, request: Request) -> None:
        """Also complain about patches for what is no image."""
        super().check(problem, request)
        if self.poisoner != "none":
            images_of(problem.train.fetch(problem.train.ids[:1]), self.name)

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Poison once with the original model, then train on both sides shuffled together."""
        model = view.model().eval()
        poison, found = self.poison(view, model, runtime)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return batch.mean(view.each_loss(model, batch))

        def passes(epoch: int) -> Pass:
            order = runtime.generator("joint", epoch)
            for batch in merged_by(view, self.batch_size, order, poison.apply):
                yield loss, batch

        outcome, _ = self.train_model(model, passes, view, runtime)
        outcome.details |= found
        return outcome

    def poison(
        self, view: View, model: nn.Module, runtime: Runtime
    ) -> tuple[Poison, dict[str, Any]]:
        """Decide label and patches of each forget sample with the original model in eval mode.

        Returns:
            The poison, and the donors and concepts it rests on.
        """
        ids, found = view.forget.ids, {}
        true = view.forget.labels() if self.needs.labels == "all" else None
        donors = logits = None
        if "logits" in self.needs.capabilities:
            logits = gathered(view.forget, ids, lambda b: view.logits(model, b).float(), runtime)
        if self._donates:
            assert true is not None
            kept = view.retain.labels()
            chosen = parts.donor_classes(self.name, true, kept, donor=self.donor, logits=logits)
            donors = torch.tensor([chosen[c] for c in true.tolist()])
            found["donor"] = {str(c): d for c, d in chosen.items()}
        labels = parts.new_labels(
            self.labeller, len(ids), classes=view.classes, true=true, donors=donors, logits=logits,
            generator=runtime.generator("labels"),
        )  # fmt: skip
        if self.poisoner == "none":
            return Poison(ids, labels), found
        assert true is not None
        assert donors is not None
        patches, centres, concepts = self._patches(view, model, runtime, true, donors)
        return Poison(ids, labels, patches, centres), found | concepts

    def _patches(
        self, view: View, model: nn.Module, runtime: Runtime, true: Tensor, donors: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Patches [n, M, C, s, s], their centres [n, M, 2], and the concepts by class."""
        forget, retain = view.forget, view.retain
        height, width = images_of(forget.fetch(forget.ids[:1]), self.name)[0].shape[-2:]
        shares = (self.window, self.stride, self.size or SIZES[self.poisoner])
        window, stride, side = (max(1, round(share * min(height, width))) for share in shares)
        windows = Windows(height, width, window, stride)
        drawn = parts.draw_donors(retain, retain.labels(), donors, runtime)
        images, place = drawn.unique(return_inverse=True)
        middle = torch.tensor([height // 2, width // 2])

        def whole(batch: Batch) -> Tensor:
            return resized(images_of(batch, self.name)[0], side, side)[:, None]

        if self.poisoner == "full":
            patches = gathered(retain, images, whole, runtime)[place]
            return patches, middle.expand(len(true), 1, 2), {}
        own, theirs, names = self._concepts(view, model, runtime, true, donors)

        def peaks(batch: Batch, vectors: dict[int, Tensor]) -> Tensor:
            x, rebuilt = images_of(batch, self.name)
            assert batch.y is not None
            return concept_centres(
                lambda part: view.penultimate(model, rebuilt(part)), x, batch.y, vectors, windows
            )

        def cut(batch: Batch) -> Tensor:
            x, _ = images_of(batch, self.name)
            crops = [parts.crop(x, at, window) for at in peaks(batch, theirs).unbind(1)]
            return torch.stack([resized(c, side, side) for c in crops], 1)

        patches = gathered(retain, images, cut, runtime)[place]
        if self.poisoner == "localized":
            centres = gathered(forget, forget.ids, lambda b: peaks(b, own), runtime)
        elif self.poisoner == "center":
            centres = middle.expand(*patches.shape[:2], 2)
        else:
            spots, generator = Windows(height, width, side, 1), runtime.generator("place")
            places = torch.randint(len(spots.corners), patches.shape[:2], generator=generator)
            centres = spots.centres(places)
        return patches, centres, {"concepts": names}

    def _concepts(
        self, view: View, model: nn.Module, runtime: Runtime, true: Tensor, donors: Tensor
    ) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[str, list[str]]]:
        """Concepts [M, d] to overwrite and to paste, by class, and the names of the former."""
        everything, bank = view.everything, load_bank(self.bank) if self.bank else None
        ids, labels = parts.few_a_class(everything, EXAMPLES, runtime)
        features = gathered(everything, ids, lambda b: view.penultimate(model, b).float(), runtime)
        own, theirs = (
            class_concepts(
                features, labels, side.unique().tolist(), bank=bank, top=self.top, named=name,
                seed=runtime.seed_for("bottleneck") % 2**32,
            )
            for side, name in ((true, self.concept), (donors, self.donor_concept))
        )  # fmt: skip
        names = {str(c): chosen for c, (chosen, _) in own.items()}
        return {c: v for c, (_, v) in own.items()}, {c: v for c, (_, v) in theirs.items()}, names
