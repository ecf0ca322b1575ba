r"""What training methods for language models share.

\[ L = \gamma\, L_{forget} + \alpha\, L_{retain} \]

over batches of forget samples, each with as many retain samples drawn at random. A method gives
\(L_{forget}\); the retain term is the likelihood of the retain answers, or the divergence from the
original there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.needs import Deviation, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train.adapters import attach, is_lora
from expunge.train.fit import Loss, Pass
from expunge.train.method import Training
from expunge.train.parts import Apart
from expunge.train.reference import Reference, ReferenceName
from expunge.train.steps import StepName
from expunge.train.token_losses import answered, kl_each_token, token_mean

Retain = Literal["nll", "kl", "none"]
_K = TypeVar("_K")
_V = TypeVar("_V")
PACE = Deviation(
    "The learning rate rises over a tenth of the steps and then falls linearly, as in "
    "OpenUnlearning, whatever the batches an epoch.",
    "tests/methods/text/test_text_training.py::test_pace_rises_and_falls",
)
"""What the methods that keep the common learning rate say of it in their card."""


@dataclass
class Text:
    """What a forget loss may use.

    Attributes:
        view: the problem as far as it was declared.
        runtime: processes, for means over whole batches.
        reference: the original; None where the method does not declare it.
        logs: parts of the loss by name, one entry a step.
        turn: number of the pass, from 0, by which alternates take turns.
        facts: what else the record keeps in its details.
    """

    view: View
    runtime: Runtime
    reference: Reference | None
    logs: dict[str, list[float]] = field(default_factory=dict)
    turn: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    def log(self, **parts: Tensor | float) -> None:
        """Note parts of this step's loss by name."""
        for name, part in parts.items():
            self.logs.setdefault(name, []).append(float(torch.as_tensor(part).detach()))

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [B, T, V] of a model."""
        return self.view.capability("token_logits")(model, batch)

    def nll(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood [B, T−1] of answered tokens, and the mask."""
        return self.view.capability("token_nll")(model, batch)

    def original_nll(self, model: nn.Module, batch: Batch, name: str = "train") -> Tensor:
        """The same under the original, without gradient."""
        assert self.reference is not None, "declare the original in `uses`"
        return self.reference.nll(model, batch, name)

    def original_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [B, T, V] of the original, without gradient."""
        assert self.reference is not None, "declare the original in `uses`"
        return self.reference.ask(model, lambda m: self.logits(m, batch))

    def token_mean(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean over the answered tokens of the whole batch: all values, or those in the mask."""
        return token_mean(values, mask, self.runtime)

    def alternates(self, batch: Batch, turn: int = 0) -> Batch:
        """Alternate answers of a batch's samples, if declared."""
        return self.view.capability("alternates")(batch, turn)


@dataclass(frozen=True, kw_only=True)
class TextTraining(Training):
    """Base of the methods in `methods/text`: they add their settings and `forget_loss`.

    Attributes:
        uses: what of the original the forget loss asks for: `nll`, `model` (anything), or nothing.
        more: further capabilities the forget loss asks the problem for.
    """

    domain: ClassVar[str] = "causal-lm"
    search: ClassVar = {"epochs": None, "lr": None}
    uses: ClassVar[Literal["", "nll", "model"]] = ""
    more: ClassVar[frozenset[str]] = frozenset()

    epochs: int = setting(10, "passes over the forget data, E", low=1, source="OpenUnlearning")
    lr: float = setting(1e-5, "learning rate, η", above=0, source="OpenUnlearning")
    batch_size: int = setting(32, "forget samples a batch, over all processes", low=1, source="OpenUnlearning, 8 × 4")  # fmt: skip
    step: StepName = setting("adamw", "optimiser: sgd, adam or adamw", source="OpenUnlearning")
    weight_decay: float = setting(0.01, "weight decay", low=0, source="OpenUnlearning")
    warmup: float = setting(0.1, "share of the steps in which the learning rate rises", low=0, high=1, source="OpenUnlearning: one epoch of ten")  # fmt: skip
    decay: Literal["linear", "none"] = setting("linear", "learning rate after that: falls to 0, or stays", source="OpenUnlearning")  # fmt: skip
    clip: float = setting(1.0, "largest gradient norm", above=0, source="transformers")
    gamma: float = setting(1.0, "weight of the forget term, γ", low=0, source="OpenUnlearning")
    alpha: float = setting(1.0, "weight of the retain term, α", low=0, source="OpenUnlearning")
    rehearse: int = setting(1, "retain samples beside each forget sample", low=1)
    retain: Retain = setting("nll", "retain term: nll, kl to the original, or none")
    reference: ReferenceName = setting("auto", "the original beside the model: copy, adapter (off), cache or auto")  # fmt: skip

    def forget_loss(self, model: nn.Module, batch: Batch, text: Text) -> Tensor:
        r"""\(L_{forget}\) of a batch of forget samples: a scalar that is minimised."""
        raise NotImplementedError

    def retain_loss(self, model: nn.Module, batch: Batch, text: Text) -> Tensor:
        r"""\(L_{retain}\) of a batch of retain samples, over their answered tokens."""
        if self.retain == "nll":
            return text.token_mean(*text.nll(model, batch))
        assert batch.y is not None
        wanted = answered(text.original_logits(model, batch), batch.y)
        each = kl_each_token(wanted, answered(text.logits(model, batch), batch.y))
        return text.token_mean(each)

    @property
    def keeps(self) -> bool:
        """Whether there is a retain term."""
        return self.retain != "none" and self.alpha > 0

    @property
    def needs(self) -> Needs:
        """Forget data, retain data for its term, the original where a term compares with it."""
        return Needs(
            forget=True,
            retain=self.keeps,
            labels="all",
            original=bool(self.uses) or (self.keeps and self.retain == "kl"),
            capabilities=frozenset({"token_logits", "token_nll"}) | self.more,
        )

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Train on forget batches, each beside retain samples."""
        model = view.model(shared=is_lora(self.train))
        if is_lora(self.train):
            attach(self.train, model, view, runtime.seed_for("lora"))
        text = self.text(view, runtime, model)
        if text.reference is not None:
            which = [self.name, self.in_force()]
            text.reference.fill(model, self.compared(text), runtime, view.forget.ids, which)
        self.begin(model, text)
        loss = self.total(text)

        def passes(epoch: int) -> Pass:
            text.turn = epoch
            for batches in self.pairs(view, runtime, epoch):
                yield loss, batches

        steps = self.epochs * math.ceil(view.forget_count / self.batch_size)
        outcome, _ = self.train_model(
            model, passes, view, runtime, clip=self.clip, pace=self.pace(steps)
        )
        self.finish(model, text, outcome)
        outcome.details |= {"losses": text.logs} | text.facts
        if text.reference is not None:
            outcome.details["reference"] = text.reference.kind
        return outcome

    def text(self, view: View, runtime: Runtime, model: nn.Module) -> Text:
        """What the forget loss may use; `model` has not been trained yet."""
        return Text(view, runtime, self.original(view, model))

    def begin(self, model: nn.Module, text: Text) -> None:
        """Look at the model before the first step; it still says what the original does."""

    def finish(self, model: nn.Module, text: Text, outcome: Outcome) -> None:
        """Look at the model after the last step, for the outcome's details."""

    def compared(self, text: Text) -> Iterator[tuple[str, Batch]]:
        """What `original_nll` will be asked for: batches, and which sequences they are."""
        for batch in text.view.forget.batches(self.batch_size):
            yield "train", batch

    def original(self, view: View, model: nn.Module) -> Reference | None:
        """The original beside the model, or None where nothing compares with it."""
        if not self.needs.original:
            return None
        only = self.uses != "model" and not (self.keeps and self.retain == "kl")
        return Reference(view, self.reference, model, only_nll=only)

    def terms(self, text: Text) -> dict[str, Loss]:
        """Terms of the loss by name, of all batches of a step; `smooth` is of the first."""
        found: dict[str, Loss] = {
            "forget": lambda model, batches: self.gamma * self.forget_loss(model, batches[0], text)
        }
        if self.keeps:
            found["retain"] = lambda model, batches: (
                self.alpha * self.retain_loss(model, batches[1], text)
            )
        return found

    def total(self, text: Text) -> Apart:
        """Their sum; each is logged, once a step."""

        def again(model: nn.Module, batches: Any) -> Tensor:
            quiet = copy.copy(text)
            quiet.logs = {}
            return self.terms(quiet)["forget"](model, batches)

        return Apart(self.terms(text), lambda name, value: text.log(**{name: value}), again)

    def pairs(self, view: View, runtime: Runtime, epoch: int) -> Iterator[tuple[Batch, ...]]:
        """Forget batches of a pass, each with `rehearse` times as many retain samples, drawn with replacement."""
        drawn = runtime.generator("retain", epoch)
        retain = view.retain if self.keeps else None
        for batch in view.forget.batches(self.batch_size, runtime.generator("forget", epoch)):
            if retain is None:
                yield (batch,)
                continue
            count = batch.total * self.rehearse
            places = torch.randint(len(retain), (count,), generator=drawn)
            yield batch, retain.fetch(retain.ids[places])

    def pace(self, steps: int) -> Callable[[int], float]:
        """Learning-rate factor by step: a linear rise, then a fall to 0, or none."""
        return rise_and_fall(steps, round(self.warmup * steps), falls=self.decay != "none")


def rise_and_fall(steps: int, rise: int, *, falls: bool = True) -> Callable[[int], float]:
    """Learning-rate factor by step: a linear rise over `rise` of the steps, then a fall to 0, or none."""

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return (steps - step) / max(steps - rise, 1) if falls else 1.0

    return factor


def of_all_processes(found: dict[_K, _V], runtime: Runtime) -> dict[_K, _V]:
    """What all processes found, by sample: shares of shuffled batches hold samples of others."""
    if runtime.processes == 1:
        return found
    parts: list[dict[_K, _V]] = [{}] * runtime.processes
    torch.distributed.all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}
