r"""Preference losses: what is to be said in place of the answers to forget.

With \(N\) the negative log-likelihood of an answer summed over its tokens, l the answer to forget, w the
preferred one, ° the original and the margin \(m = (N_l - N^\circ_l) - (N_w - N^\circ_w)\),

\[
L_{forget} = \mathrm{mean}_{seq}\Big[ -\frac{2}{\beta} \log \sigma(\beta m) \ \text{ or }\ \big(m - \tfrac{1}{2\beta}\big)^2 \Big] + c\, \mathrm{mean}_{seq} N_w
\]

The factor 2 / β makes the gradient at the original that of \(N_w - N_l\), whatever β. Nothing in m says that
w becomes likely; so what becomes of both answers is noted at every step, and the pairs whose answers are
most alike can be left out beforehand (`keep=`, see `analysis/ches.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from expunge.analysis import ches
from expunge.core.data import Batch
from expunge.core.needs import Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train import displacement
from expunge.train.parts import Apart
from expunge.train.text import Text, TextTraining, of_all_processes
from expunge.train.token_losses import sequence_sum


def preference(margin: Tensor, beta: float) -> Tensor:
    r"""\(-\frac2\beta \log\sigma(\beta m)\) [B] of margins m [B] in nats; without w, m = N − N°."""
    return -2 / beta * logsigmoid(beta * margin)


def ipo(margin: Tensor, beta: float) -> Tensor:
    r"""\((m - \frac{1}{2\beta})^2\) [B] of margins m [B] in nats: the margin is to reach a value."""
    return (margin - 1 / (2 * beta)).square()


@dataclass
class Preferences(Text):
    """What a preference loss may use besides.

    Attributes:
        kept: by sample, the turns whose alternate may be preferred; None where all may.
        seen: of the batch that was just looked at: log-ratios of the answers to forget and of the
            preferred ones [B], and whether there is one [B].
        moved: of each step, what became of these answers.
        first: mean probability [V] of the first token of an answer under the original.
    """

    kept: dict[int, list[int]] | None = None
    seen: tuple[Tensor, Tensor, Tensor] | None = None
    moved: list[dict[str, float]] = field(default_factory=list)
    first: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PreferenceTraining(TextTraining):
    """Base of the methods that differ in what is preferred: they give `preferred` and `turns`."""

    uses: ClassVar[Literal["", "nll", "model"]] = "nll"
    search: ClassVar = {"lr": None, "epochs": None, "beta": None}

    beta: float = setting(0.1, "inverse temperature, β", above=0, source="OpenUnlearning")
    loss: Literal["dpo", "ipo"] = setting("dpo", "of the margin m: dpo, −2/β log σ(βm), or ipo, (m − 1/2β)²", source="CHES")  # fmt: skip
    sft: float = setting(0.0, "weight c of the preferred answers' own likelihood", low=0, source="CHES")  # fmt: skip
    keep: float = setting(1.0, "share of the pairs to keep, those with the lowest scores", above=0, high=1, source="CHES")  # fmt: skip
    score: ches.Score = setting("ln-ches", "which score: ln-ches, ches, edit or last", source="CHES")  # fmt: skip

    @property
    def needs(self) -> Needs:
        """States of both answers too where pairs are left out."""
        given = super().needs
        own = frozenset({"tapped"} if self.keep < 1 else ())
        return replace(given, capabilities=given.capabilities | own)

    @property
    def turns(self) -> int:
        """Passes after which the same preferred answers come again."""
        raise NotImplementedError

    def preferred(self, batch: Batch, turn: int, text: Text) -> Batch:
        """The questions of a batch with the answers preferred in a turn."""
        raise NotImplementedError

    def text(self, view: View, runtime: Runtime, model: nn.Module) -> Preferences:
        """What the forget loss may use; `model` has not been trained yet."""
        return Preferences(**vars(super().text(view, runtime, model)))

    def forget_loss(self, model: nn.Module, batch: Batch, text: Text) -> Tensor:
        """The loss of the answers to forget against those preferred in this pass."""
        lost, won, said, there = self.ratios(model, batch, text)
        text.runtime.cost.gradients += int(there.sum())
        if isinstance(text, Preferences):
            text.seen = lost.detach(), won.detach(), there
        each = (preference if self.loss == "dpo" else ipo)(lost - won, self.beta)
        return batch.mean(each + self.sft * said if self.sft else each)

    def ratios(
        self, model: nn.Module, batch: Batch, text: Text
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""\(N_l - N^\circ_l\), \(N_w - N^\circ_w\) and \(N_w\) [B], and whether there is a w [B].

        Without one the last two are 0, and the margin is that of a rejected answer alone.
        """
        parts = list(self._parts(batch, text))
        # before the model, whose activations are held until its backward pass
        lost_before = sequence_sum(text.original_nll(model, batch, "train"))
        won_before = [sequence_sum(text.original_nll(model, p, name)) for p, name, _ in parts]
        lost = sequence_sum(text.nll(model, batch)[0]) - lost_before
        if len(parts) == 1 and parts[0][2] is None:
            said = sequence_sum(text.nll(model, parts[0][0])[0])
            return lost, said - won_before[0], said, torch.ones_like(lost, dtype=torch.bool)
        won, said, there = (torch.zeros_like(lost) for _ in range(3))
        for (part, _, places), before in zip(parts, won_before, strict=True):
            found = sequence_sum(text.nll(model, part)[0])
            said = said.index_add(0, places, found)
            won = won.index_add(0, places, found - before)
            there = there.index_add(0, places, torch.ones_like(found))
        return lost, won, said, there.bool()

    def _parts(self, batch: Batch, text: Text) -> Iterator[tuple[Batch, str, Any]]:
        """The preferred answers of this pass by turn: batch, name, and places (None: all)."""
        kept = getattr(text, "kept", None)
        if kept is None:
            turn = text.turn % self.turns
            yield self.preferred(batch, turn, text), _name(turn), None
            return
        own = [kept.get(i, []) for i in batch.ids.tolist()]
        now = [turns[text.turn % len(turns)] if turns else -1 for turns in own]
        for turn in sorted({t for t in now if t >= 0}):
            places = torch.tensor([n for n, t in enumerate(now) if t == turn]).to(batch.ids.device)
            yield self.preferred(batch.rows(places), turn, text), _name(turn), places

    def compared(self, text: Text) -> Iterator[tuple[str, Batch]]:
        """The answers to forget, and those preferred in each turn."""
        yield from super().compared(text)
        # of a sample without its first alternates a later one may come first
        for turn in range(self.turns if self.keep < 1 else min(self.turns, self.epochs)):
            for batch in text.view.forget.batches(self.batch_size):
                yield _name(turn), self.preferred(batch, turn, text)

    def begin(self, model: nn.Module, text: Text) -> None:
        """Choose the pairs to keep, and note what the original would say first."""
        assert isinstance(text, Preferences)
        if self.keep < 1:
            text.kept, chosen = self._keep(model, text)
            text.facts["displacement"] = {"filter": chosen}
        text.first = self._first(model, text)

    @torch.no_grad()
    def _keep(self, model: nn.Module, text: Text) -> tuple[dict[int, list[int]], dict[str, Any]]:
        """Turns whose alternates are kept, by sample, and what was left out."""
        last, tapped = text.view.role("last layer")[0], text.view.capability("tapped")
        mine: dict[tuple[int, int], float] = {}

        def states(part: Batch) -> Tensor:
            return ches.states_of(model, last, lambda m: tapped(m, part, []))  # never packed

        for batch in text.view.forget.batches(self.batch_size):
            for turn in range(self.turns):
                other = self.preferred(batch, turn, text)
                assert batch.y is not None
                assert other.y is not None
                found = ches.score(self.score, (states(other), states(batch)), (other.y, batch.y))
                mine |= {(i, turn): v for i, v in zip(batch.ids.tolist(), found.tolist(), strict=True)}  # fmt: skip
        everyone = dict(sorted(of_all_processes(mine, text.runtime).items()))
        pairs = list(everyone)
        scores = torch.tensor([everyone[pair] for pair in pairs], dtype=torch.float64)
        places = ches.lowest(scores, self.keep)
        kept: dict[int, list[int]] = {}
        for i, turn in (pairs[p] for p in places.tolist()):
            kept.setdefault(i, []).append(turn)
        return kept, {
            "score": self.score,
            "pairs": len(pairs),
            "kept": len(places),
            "highest_kept": float(scores[places].nan_to_num(nan=-torch.inf).max()),
            "unscored": int(scores.isnan().sum()),
            "samples_without": len({i for i, _ in pairs} - set(kept)),
        }

    def total(self, text: Text) -> Apart:
        """The terms of the loss; beside them is noted what became of the answers."""
        found = super().total(text)

        def note(name: str, value: Tensor) -> None:
            found.note(name, value)
            if name == "forget" and isinstance(text, Preferences) and text.seen is not None:
                text.moved.append(displacement.moved(*text.seen, text.runtime))

        return replace(found, note=note)

    def finish(self, model: nn.Module, text: Text, outcome: Outcome) -> None:
        """Put what was noted into curve and details, and look once at all answers to forget."""
        assert isinstance(text, Preferences)
        assert text.first is not None
        # a resumed training has noted its last steps only
        early = max(outcome.details["steps"] - len(text.moved), 0)
        for entry in outcome.curve:
            place = entry["step"] - 1 - early
            entry |= text.moved[place] if 0 <= place < len(text.moved) else {}
        end = self._end(model, text)
        sides = {"preferred": displacement.first_tokens(self._others(text)),
                 "forget": displacement.first_tokens(text.view.forget.batches(self.batch_size))}  # fmt: skip
        facts = text.facts.setdefault("displacement", {})
        facts |= {
            "end": end,
            "winners": displacement.winners(self._first(model, text) - text.first, sides),
        }
        line = displacement.alarm(end["alternate"])
        if line:
            facts["alarm"] = line
            text.runtime.reporter.say(line)

    @torch.no_grad()
    def _end(self, model: nn.Module, text: Preferences) -> dict[str, float]:
        """What became of all answers, of each question with the first alternate it has."""
        text.turn, found = 0, []
        for batch in text.view.forget.batches(self.batch_size):
            lost, won, _, there = self.ratios(model, batch, text)
            found.append((lost, won, there))
        lost, won, there = (torch.cat(column) for column in zip(*found, strict=True))
        return displacement.moved(lost, won, there, text.runtime)

    def _others(self, text: Text) -> Iterator[Batch]:
        for batch in text.view.forget.batches(self.batch_size):
            yield from (part for part, _, _ in self._parts(batch, text))

    @torch.no_grad()
    def _first(self, model: nn.Module, text: Text) -> Tensor:
        """Mean probability [V] of each token to begin an answer to forget."""
        batches = text.view.forget.batches(self.batch_size)
        parts = [displacement.first_probabilities(text.logits(model, b), b) for b in batches]
        return text.runtime.sum(torch.stack(parts).sum(0)).cpu() / text.view.forget_count


def _name(turn: int) -> str:
    return f"preferred {turn}"
