r"""ConceptMask: train on the model's own answers with the words that carry an entity masked.

\[ L = \mathrm{CE}(\tilde y \mid x) + \mathrm{CE}(D_r), \qquad \tilde y = \mathrm{mask}(\hat y, W_k \cup N) \]

\(\hat y\) is what the model itself answers to a question about the entity, \(N\) the parts of the
entity's name, and \(W_k\) the first k words of \(\hat y\) by a score over all answers about it:

\[ s(w) = \sum_{\hat y} \frac{\max(a_w(\hat y), 0)}{\sum_v \max(a_v(\hat y), 0)} \]

with the attribution \(a_w\) of \(\log p(\hat y \mid x)\) to the word's embeddings (integrated gradients,
`analysis/token_attribution.py`). As many retain answers stand beside the poisoned ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from expunge.analysis.integrated_gradients import Rule
from expunge.analysis.token_attribution import (
    STOP_WORDS,
    Baseline,
    attribute_answer,
    ranked,
    word_shares,
)
from expunge.core.data import Batch
from expunge.core.errors import DataError, SettingError
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.methods.text.idk_dpo import shipped_refusals
from expunge.problems.replies import rows_of
from expunge.problems.tokens import Tokens
from expunge.problems.words import MASK, Word, masked, names_in
from expunge.train.text import Text, TextTraining, of_all_processes

_TEST = "tests/methods/text/test_concept_mask.py::test_concept_mask_"


@dataclass(frozen=True)
class Answer:
    """What the model itself says to a question, before it is poisoned.

    Attributes:
        entity: what the question is about.
        text: the answer.
        words: of the text, in order.
        shares: of the words in what the answer rests on.
        error: completeness error of the attribution, as a share of what it adds up to.
    """

    entity: str
    text: str
    words: list[Word]
    shares: dict[str, float]
    error: float = 0.0


@dataclass
class _Poisoned(Text):
    said: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ConceptMask(TextTraining):
    """Fine-tune on poisoned answers (masked, or refusals) beside answers to keep.

    The next request starts from the weights this one left, with answers made and attributed anew.
    """

    name: ClassVar[str] = "concept-mask"
    search: ClassVar = {"lr": None, "epochs": None, "k": None}
    card: ClassVar[Card] = Card(
        title="Class Machine Unlearning for Complex Data via Concepts Inference and Data Poisoning",
        authors="Chang, Zhu, Xu, Liu, Zhou",
        year=2024,
        link="https://arxiv.org/abs/2405.15662",
        idea="Mask the words an answer rests on in the model's own answers, and train on those.",
        intent="suppression",
        fidelity="variant",
        deviations=(
            Deviation(
                "Every question of the request is used, whether or not the model answers it rightly.",
                _TEST + "every_question_is_poisoned",
            ),
            Deviation(
                "Poisoned answers and anchors stand beside each other in every step, each with a mean "
                "over its own tokens; the released code shuffles them together.",
                _TEST + "loss_is_that_of_the_formula",
            ),
            Deviation(
                "Integrals take the midpoint rule; the released code's includes both ends.",
                _TEST + "scores_are_those_of_the_attributions",
            ),
            Deviation(
                "Adapters go on keys as well as queries and values, and have no dropout; the weights "
                "after the last step are released, without a choice among checkpoints.",
                _TEST + "defaults_are_the_card_s",
            ),
            Deviation(
                "An answer in which nothing is masked becomes the mask alone: as it is it would be "
                "learnt again.",
                _TEST + "an_answer_without_such_words_is_the_mask",
            ),
            Deviation(
                "Refusals and stop words are the package's own.",
                _TEST + "refusals_in_place_of_masks",
            ),
        ),
    )

    lr: float = setting(2e-5, "learning rate, η", above=0, source="released code")
    batch_size: int = setting(1, "poisoned answers a batch, over all processes", low=1, source="released code: 2 with the anchor")  # fmt: skip
    schedule: Literal["constant", "cosine"] = setting("cosine", "learning rate over the epochs: constant, or falling as half a cosine", source="released code")  # fmt: skip
    warmup: float = setting(0.03, "share of the steps in which the learning rate rises", low=0, high=1, source="released code")  # fmt: skip
    decay: Literal["linear", "none"] = setting("none", "learning rate after that, beside the schedule: falls to 0, or stays")  # fmt: skip
    train: str = setting("lora(8, attention in)", "weights that move: full, last(K), role(NAME), saliency(Q), sparse(Q), lora(R)", source="released code: queries and values")  # fmt: skip
    poison: Literal["mask", "idk"] = setting("mask", "answers to train on: masked ones, or refusals", source="paper")  # fmt: skip
    words: Literal["ig", "random", "names"] = setting("ig", "what is masked: the words the answers rest on, words at random, or names alone", source="paper")  # fmt: skip
    k: int = setting(5, "words of an answer that are masked beside names", low=0, source="paper")
    entity: str | None = setting(None, "column with a sample's entity: its name is masked and its words ranked by themselves; none: all samples are about one")  # fmt: skip
    names: tuple[str, ...] = setting((), "further names that are masked")
    mask: str = setting(MASK, "what stands for a masked word", source="released code")
    tokens: int = setting(64, "largest number of tokens of the model's own answers", low=1)
    steps: int = setting(32, "points of the path of integrated gradients", low=1, source="released code")  # fmt: skip
    baseline: Baseline = setting("pad", "where the path begins: the padding's embedding, or zero", source="released code has both")  # fmt: skip
    rule: Rule = setting("midpoint", "rule of the integral: midpoint or trapezoid")

    def __post_init__(self) -> None:
        """Check the settings; raises `SettingError` also for names without any."""
        super().__post_init__()
        if self.words == "names" and not self.names and self.entity is None:
            raise SettingError("words=names masks names; pass names=, or entity= with their column")

    @property
    def needs(self) -> Needs:
        """Questions and their answers of both sides, and the model's own answers."""
        own = {"replied"}
        if self.poison == "mask":
            own |= {"proposed", "spelled", "filler"} | ({"column"} if self.entity else set())
        given = super().needs
        return replace(given, capabilities=given.capabilities | own)

    def check(self, problem: Problem, request: Request) -> None:
        """Also complain about a column that the data does not have."""
        super().check(problem, request)
        if self.entity is not None and self.entity not in problem.train.columns:
            known = ", ".join(sorted(problem.train.columns)) or "none"
            raise DataError(f"the data has no column {self.entity!r}; it has {known}")

    def text(self, view: View, runtime: Runtime, model: nn.Module) -> Text:
        """Poison once, with the model as it is before training."""
        text = super().text(view, runtime, model)
        if self.poison == "idk":
            known = shipped_refusals()
            places = {i: runtime.seed_for("refusal", i, 0) for i in view.forget.ids.tolist()}
            return _Poisoned(
                **vars(text), said={i: known[p % len(known)] for i, p in places.items()}
            )
        found = of_all_processes(dict(self.answers(view, runtime, model)), runtime)
        said = self.poisoned(found, runtime)
        text.facts |= {
            "answers": len(said),
            "nothing to mask": sum(answer == self.mask for answer in said.values()),
            "completeness error": max((abs(a.error) for a in found.values()), default=0.0),
        }
        return _Poisoned(**vars(text), said=said)

    def forget_loss(self, model: nn.Module, batch: Batch, text: Text) -> Tensor:
        """Negative log-likelihood of the poisoned answers, a mean over their tokens."""
        assert isinstance(text, _Poisoned)
        said = [text.said[i] for i in batch.ids.tolist()]
        return text.token_mean(*text.nll(model, text.view.capability("replied")(batch, said)))

    def answers(
        self, view: View, runtime: Runtime, model: nn.Module
    ) -> Iterator[tuple[int, Answer]]:
        """The model's own greedy answers, attributed; of this process' share of the samples."""
        proposed, spelled = view.capability("proposed"), view.capability("spelled")
        with runtime.task("answers", view.forget_count) as task:
            for batch in view.forget.batches(16):
                said, _ = proposed(model, batch, temperature=0.0, seeds=(), tokens=self.tokens)
                about = [""] * len(batch)
                if self.entity is not None:
                    about = [str(e) for e in view.capability("column")(batch, self.entity)]
                rows = zip(batch.ids.tolist(), rows_of(batch), about, said, strict=True)
                for i, row, entity, ids in rows:
                    text, words = spelled(ids)
                    ask = self.words == "ig" and self.k > 0 and len(words) > 0
                    more = self._shares(model, view, row, ids, words, runtime) if ask else ({}, 0.0)
                    yield i, Answer(entity, text, words, *more)
                task.advance(batch.total)

    def poisoned(self, found: dict[int, Answer], runtime: Runtime) -> dict[int, str]:
        """Mask the chosen words of each answer.

        Args:
            found: answers by sample.
            runtime: its seed draws random words.

        Returns:
            What is to be answered instead.
        """
        about: dict[str, list[dict[str, float]]] = {}
        for answer in found.values():
            about.setdefault(answer.entity, []).append(answer.shares)
        scores = {entity: ranked(shares) for entity, shares in about.items()}
        said = {}
        for i, answer in found.items():
            there = dict.fromkeys(w.key for w in answer.words if w.key not in STOP_WORDS)
            if self.words == "random":
                order = sorted(there)
                drawn = torch.randperm(len(order), generator=runtime.generator("words", i))
                chosen = {order[p] for p in drawn[: self.k].tolist()}
            else:  # of names alone no word has a score
                chosen = set([w for w in scores[answer.entity] if w in there][: self.k])
            hidden = [w.text for w in answer.words if w.key in chosen]
            hidden += names_in([answer.entity, *self.names])
            text = masked(answer.text, hidden, self.mask)
            said[i] = self.mask if text == answer.text else text
        return said

    def _shares(
        self,
        model: nn.Module,
        view: View,
        row: Tokens,
        ids: Tensor,
        words: list[Word],
        runtime: Runtime,
    ) -> tuple[dict[str, float], float]:
        """Shares of an answer's words, and the completeness error relative to F(e) − F(e')."""
        prompt = row.prompt
        whole = torch.cat([prompt, ids])
        found = attribute_answer(
            model, Tokens(whole, torch.arange(len(whole)) >= len(prompt)),
            baseline=self.baseline, filler=view.capability("filler")(), steps=self.steps, rule=self.rule,
        )  # fmt: skip
        runtime.cost.gradients += self.steps
        shares = word_shares(words, found.tokens[len(prompt) :])
        return shares, found.error / max(abs(found.difference), 1e-6)
