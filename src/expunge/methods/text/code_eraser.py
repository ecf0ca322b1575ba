r"""CodeEraser (SSCU): forget the secrets in texts and keep what stands around them, in two steps a pass.

\[
\begin{aligned}
L_1 &= \mathrm{mean}_{forget}\big(-\mathrm{CE}_{secret} + \gamma\, \mathrm{CE}_{context} - \lambda\, \mathrm{KL}_{secret}\big) \\
L_2 &= \lambda \alpha\, \mathrm{mean}_{retain}\, \mathrm{KL}, \qquad \mathrm{KL}_t = \mathrm{KL}\big(p_{\theta_0}(\cdot \mid y_{<t})\,\|\,p_\theta(\cdot \mid y_{<t})\big)
\end{aligned}
\]

with means over the sensitive tokens of a sample, or over its others. Each step is taken over its complete
set. \(-\mathrm{CE}\) is not bounded below: a threshold on what is still said ends the ascent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import DataError, NeedsError, SettingError
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.outcome import Outcome
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import Source, View
from expunge.problems.segments import segments, sensitive
from expunge.problems.tokens import TokenData, Tokens, unpadded
from expunge.train.adapters import adapter_of, attach, is_lora
from expunge.train.fit import Pass
from expunge.train.parts import Apart
from expunge.train.scale_shift import is_scale_shift
from expunge.train.smooth import parse_smooth
from expunge.train.steps import StepName
from expunge.train.text import Retain, Text, TextTraining
from expunge.train.token_losses import kl_each_token, sequence_mean, sequence_sum, token_nll
from expunge.train.until import Goal, Watch

Each = Callable[[nn.Module, Batch, Text], Tensor]
_TEST = "tests/methods/text/test_code_eraser.py::test_"


@dataclass(frozen=True, kw_only=True)
class CodeEraser(TextTraining):
    """Ascend on marked tokens, descend on the others, and hold retain texts at the original.

    `constrain=0` is SSGA, `spans=all` is CU, and both with `gamma=0` are gradient ascent. A result
    composes with the next request by running again from it, with its own secrets.
    """

    name: ClassVar[str] = "code-eraser"
    uses: ClassVar[Literal["", "nll", "model"]] = "model"
    more: ClassVar[frozenset[str]] = frozenset({"marks", "generate", "ends"})
    search: ClassVar = {"lr": None, "epochs": None, "gamma": None, "constrain": None}
    card: ClassVar[Card] = Card(
        title="Scrub It Out! Erasing Sensitive Memorization in Code Language Models via Machine Unlearning",
        authors="Chu, Wan, Zhang, Wang, Yang, Zhang, Zhou, Shi, Jin, Lo",
        year=2025,
        link="https://arxiv.org/abs/2509.13755",
        idea="Unlearn only the secret tokens of a text; the code around them is trained on.",
        deviations=(
            Deviation(
                "Padding counts nowhere; in the official code it thins out the context's loss and is in "
                "the retain divergence.",
                _TEST + "losses_are_their_formulas",
            ),
            Deviation(
                "A step may read its set in several batches.",
                _TEST + "the_batch_size_does_not_matter",
            ),
            Deviation(
                "A token is secret if it overlaps the segment; encode(touch=adjacent) gives the official "
                "choice, the tokens beside it too.",
                "tests/problems/test_secrets.py::test_touch_adjacent_marks_the_neighbours_too",
            ),
            Deviation(
                "Adam has the usual betas, 0.9 and 0.999, where the paper has 0.9 and 0.98, and "
                "gradients are clipped at norm 1.",
                _TEST + "defaults_are_the_papers",
            ),
            Deviation(
                "Retain samples are drawn from all of them, not from those that are memorised.",
                _TEST + "retain_samples_are_drawn_once",
            ),
        ),
    )

    epochs: int = setting(100, "passes, of a forget and a retain step each, at most", low=1, source="paper")  # fmt: skip
    lr: float = setting(3e-6, "learning rate, η", above=0, source="paper")
    batch_size: int = setting(8, "samples at a time, over all processes; a step is over the whole set", low=1, source="official code: 2 × 4 devices")  # fmt: skip
    step: StepName = setting("adam", "optimiser: sgd, adam or adamw", source="paper")
    weight_decay: float = setting(0.0, "weight decay", low=0)
    warmup: float = setting(0.0, "share of the steps in which the learning rate rises", low=0, high=1, source="paper: constant")  # fmt: skip
    decay: Literal["linear", "none"] = setting("none", "learning rate after that: falls to 0, or stays", source="paper")  # fmt: skip
    gamma: float = setting(0.1, "weight of the context's descent, γ", low=0, source="paper")
    constrain: float = setting(0.1, "weight of the divergences, λ", low=0, source="paper")
    alpha: float = setting(1.0, "weight of the retain divergence beside λ, α", low=0, source="paper")  # fmt: skip
    rehearse: int = setting(1, "retain samples for each forget sample, drawn once", low=1, source="paper: 32 for 32")  # fmt: skip
    retain: Retain = setting("kl", "retain term: nll, kl to the original, or none", source="paper")
    retain_kl: Literal["sequence", "token"] = setting("sequence", "divergence of a retain sample: the sum over its tokens, or their mean", source="official code: sum")  # fmt: skip
    spans: Literal["marked", "all"] = setting("marked", "what is secret: marked tokens, or all that is answered")  # fmt: skip
    accuracy: float = setting(0.4557, "stop when the secrets' memorisation accuracy is below, T_MA; 0 never stops", low=0, high=1, source="CodeParrot-small on unseen code")  # fmt: skip
    extraction: float = setting(0.0549, "and their extraction likelihood EL_10, T_EL", low=0, source="CodeParrot-small on unseen code")  # fmt: skip
    margin: float = setting(0.3, "how far above T_MA the extraction likelihood is looked at", low=0, source="official commands")  # fmt: skip
    patience: int = setting(5, "looks without a lower EL_10 that stop too", low=1, source="official code")  # fmt: skip
    keep: Literal["best", "last"] = setting("best", "weights at the end: those with the lowest accuracy, or the last", source="official code")  # fmt: skip

    def __post_init__(self) -> None:
        """Check the settings; raises `SettingError` where one kind of final weights would undo another."""
        super().__post_init__()
        if self.keep == "best" and parse_smooth(self.smooth)[0] == "swa":
            raise SettingError(
                f"smooth={self.smooth} ends with a mean of weights and keep=best with those of one look; "
                "use keep=last with it"
            )

    @property
    def keeps(self) -> bool:
        """Whether there is a retain step."""
        return super().keeps and self.constrain > 0

    @property
    def needs(self) -> Needs:
        """Without divergences, neither retain data nor the original."""
        return replace(super().needs, original=self.constrain > 0)

    def check(self, problem: Problem, request: Request) -> None:
        """Complain where nothing to forget is marked as secret.

        Raises:
            DataError: as it says.
        """
        super().check(problem, request)
        if self.spans == "all" or not isinstance(problem.train, TokenData):
            return
        places = problem.train.positions(request.resolve(problem.train)).tolist()
        if all(sensitive(problem.train.rows[p]) is None for p in places):
            raise DataError(
                "code-eraser forgets sensitive segments, and none is marked in what is to be forgotten; "
                "give records a `secret` or `spans`, use --secrets detect, or set spans=all"
            )

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Take a forget step and a retain step in turn until the secrets are no longer said."""
        if runtime.sharded:
            raise NeedsError("code-eraser looks at its model while it trains, which a sharded one does not allow")  # fmt: skip
        if is_scale_shift(self.train):
            raise SettingError("code-eraser goes back to weights on its way, and train=scale_shift() folds them at its end; use lora(R)")  # fmt: skip
        model = view.model(shared=is_lora(self.train))
        if is_lora(self.train):
            attach(self.train, model, view, runtime.seed_for("lora"))
        text = self.text(view, runtime, model)
        phases = self.phases(text)
        pieces = math.ceil(max(len(source) for *_, source in phases) / self.batch_size)
        goal = Goal(self.accuracy, self.extraction, self.patience, self.margin)
        watch = Watch(
            model, self.secrets(view), view.capability("token_logits"),
            view.capability("generate"), goal, runtime, self.batch_size,
            [self.name, self.in_force(), view.forget.ids.tolist()],
        )  # fmt: skip

        def passes(epoch: int) -> Pass:
            watch.look(epoch)
            for name, each, source in phases:
                loss = self.share(name, each, len(source) / pieces, text)
                for ids in source.ids.tensor_split(pieces):
                    yield loss, (source.fetch(ids),)

        outcome, fitted = self.train_model(
            model, passes, view, runtime, clip=self.clip, accumulate=pieces,
            pace=self.pace(self.epochs * len(phases)), stop=lambda _: watch.stopped,
        )  # fmt: skip
        turn = fitted.steps / len(phases)
        if fitted.average:  # the mean is the result, and was not looked at
            watch.seen[turn] = watch.measure()
        elif not watch.stopped:
            watch.look(turn, keep=False)
        if self.keep == "best" and watch.best is not None:
            watch.put_back()
            outcome.change = adapter_of(model) if is_lora(self.train) else None
        looks = dict(sorted(watch.seen.items()))
        outcome.details |= {
            "losses": {n: _means(each, pieces) for n, each in text.logs.items()},
            "accuracy": [a for a, _ in looks.values()],
            "extraction": [e if math.isfinite(e) else None for _, e in looks.values()],
            "kept_after": watch.best if self.keep == "best" else max(looks),
        }
        return outcome

    def phases(self, text: Text) -> list[tuple[str, Each, Source]]:
        """The steps of a pass: a name, losses of single samples, and the set they are taken over."""
        forget = text.view.forget
        found: list[tuple[str, Each, Source]] = [("forget", self.each_forget, forget)]
        if self.keeps:
            count = self.rehearse * len(forget)
            kept = text.view.retain.part(count, text.runtime.generator("retain"))
            found.append(("retain", self.each_retain, kept))
        return found

    @staticmethod
    def share(name: str, each: Each, count: float, text: Text) -> Apart:
        """A piece's part of the mean over a whole set, whose pieces have `count` samples on average.

        Pieces, and the shares of processes, are averaged by the training loop; one may be empty.
        """

        def loss(model: nn.Module, batches: tuple[Batch, ...]) -> Tensor:
            (batch,) = batches
            return each(model, batch, text).sum() / (count / batch.processes)

        return Apart({name: loss}, lambda name, value: text.log(**{name: value}))

    def forget_loss(self, model: nn.Module, batch: Batch, text: Text) -> Tensor:
        r"""\(L_1\) of a batch."""
        return batch.mean(self.each_forget(model, batch, text))

    def retain_loss(self, model: nn.Module, batch: Batch, text: Text) -> Tensor:
        r"""\(L_2\) of a batch."""
        return batch.mean(self.each_retain(model, batch, text))

    def each_forget(self, model: nn.Module, batch: Batch, text: Text) -> Tensor:
        """−CE of secret tokens + γ CE of others − λ KL of secret tokens [B]; 0 where there are none."""
        assert batch.y is not None
        logits = text.logits(model, batch)
        nll, answered = token_nll(logits, batch.y)
        secret = self.secret(batch, text) & answered
        each = -sequence_mean(nll * secret, secret)
        if self.gamma > 0:
            each = each + self.gamma * sequence_mean(nll * ~secret, answered & ~secret)
        if self.constrain > 0:
            kl = divergence(text.original_logits(model, batch), logits, secret)
            each = each - self.constrain * sequence_mean(kl, secret)
        return each

    def each_retain(self, model: nn.Module, batch: Batch, text: Text) -> Tensor:
        """λ α KL [B] of the answered tokens, or as much of their likelihood."""
        assert batch.y is not None
        logits = text.logits(model, batch)
        values, answered = token_nll(logits, batch.y)
        if self.retain == "kl":
            values = divergence(text.original_logits(model, batch), logits, answered)
        total = self.retain == "kl" and self.retain_kl == "sequence"
        each = sequence_sum(values) if total else sequence_mean(values, answered)
        return self.constrain * self.alpha * each

    def secret(self, batch: Batch, text: Text) -> Tensor:
        """Which targets [B, T−1] are secret tokens."""
        if self.spans == "all":
            return torch.ones_like(batch.x["input_ids"][:, 1:], dtype=torch.bool)
        return text.view.capability("marks")(batch)[:, 1:]

    def secrets(self, view: View) -> list[Tokens]:
        """The segments whose accuracy ends the training."""
        ends, found = view.capability("ends")(), []
        for batch in view.forget.batches(self.batch_size):
            marks = view.capability("marks")(batch).cpu()
            real = batch.x["attention_mask"].bool().cpu()
            for row, marked, there in zip(unpadded(batch), marks, real, strict=True):
                known = replace(row, marked=marked[there])
                if self.spans == "all":
                    found += segments(row, ends)
                elif sensitive(known) is not None:
                    found += segments(known, ends)
        return found


def _means(values: list[float], size: int) -> list[float]:
    """Means of each so many values in a row; of a remainder none."""
    whole = len(values) // size * size
    return [sum(values[n : n + size]) / size for n in range(0, whole, size)]


def divergence(original: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """KL(original ‖ model) [B, T−1] in nats of next tokens in a mask, 0 elsewhere; logits [B, T, V]."""
    each = kl_each_token(original[:, :-1][mask], logits[:, :-1][mask])
    return torch.zeros_like(mask, dtype=each.dtype).masked_scatter(mask, each)
