r"""Guard: refuse to read prompts about what is to be forgotten, and to say it.

\[
\hat M(x) = \begin{cases} \text{a fixed refusal} & \text{if } x \text{ is flagged, from } y_{\ge 1} \\
\text{a fixed refusal} & \text{from } y_{\ge t}, \text{ where } y_{\le t} \text{ would hold a blocked phrase} \\
M(x) & \text{otherwise} \end{cases}
\]

The input filter is a calibrated gate on prompts and a list of phrases; the output filter is a list of
phrases, by default with the answers to forget. Unlike unlearning it also acts on what a prompt itself brings
in. No weight changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from expunge.core.errors import NeedsError, SettingError
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.methods.text.idk_dpo import shipped_refusals
from expunge.problems.tokens import unpadded
from expunge.train.gate import Gate
from expunge.train.gated_method import GatedMethod, behind, prompts_of
from expunge.train.refusing import Refusing

_TEST = "tests/methods/text/test_guard.py::test_"


@dataclass(frozen=True, kw_only=True)
class Guard(GatedMethod):
    """Put a content filter around the original; suppression, not removal.

    A result composes with the next request by guarding the original anew, against both sets.
    """

    name: ClassVar[str] = "guard"
    search: ClassVar = {"alpha": (0.01, 0.3, "log")}
    card: ClassVar[Card] = Card(
        title="UnUnlearning: Unlearning is not sufficient for content regulation in advanced generative AI",
        authors="Shumailov, Hayes, Triantafillou, Ortiz-Jimenez, Papernot, Jagielski, Yona, Howard, Bagdasaryan",
        year=2024,
        link="https://arxiv.org/abs/2407.00106",
        idea="What a prompt brings back no unlearning can stop; a filter on prompts and answers can.",
        intent="suppression",
        guarantee="inference-time",
        fidelity="variant",
        deviations=(
            Deviation(
                "The paper argues for filters and builds none; gate, phrases and refusal are the "
                "package's.",
                _TEST + "flagged_prompts_are_followed_by_the_refusal",
            ),
            Deviation(
                "An answer that is also an answer to a question that is kept is not blocked.",
                _TEST + "answers_shared_with_what_is_kept_are_not_blocked",
            ),
        ),
    )

    gate: bool = setting(True, "flag prompts by a gate, fitted on those to forget and to keep")
    phrases: tuple[str, ...] = setting((), "phrases that neither prompts nor answers may hold")
    answers: Literal["none", "said", "both"] = setting("said", "block the answers to forget: not, when said, or in prompts too")  # fmt: skip
    refusal: str = setting("", "what is said instead; a shipped sentence if empty")

    def __post_init__(self) -> None:
        """Check that something is recognised.

        Raises:
            SettingError: there is neither gate nor phrase nor answer.
        """
        super().__post_init__()
        if not self.gate and not self.phrases and self.answers == "none":
            raise SettingError("a guard needs something to recognise: gate, phrases or answers")

    @property
    def needs(self) -> Needs:
        """Prompts and answers of both sides; other ways to write phrases, and the refusal in tokens."""
        return Needs(
            forget=True, retain=True, labels="all",
            capabilities=frozenset({"replied", "spellings", "without_end"}),
        )  # fmt: skip

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Fit and calibrate the gate, collect the phrases, wrap the original."""
        if runtime.processes > 1:
            raise NeedsError("guard reads every prompt in one process; run it without others")
        forget, retain = prompts_of(view.forget), prompts_of(view.retain)
        gate = Gate(torch.zeros(0, dtype=torch.long), torch.zeros(0), 0.0)
        facts: dict[str, Any] = {}
        if self.gate:
            gate, facts = self.fitted(forget, retain, runtime)
        blocked, shared = self._answers(view)
        phrases = [ids for text in self.phrases for ids in view.capability("spellings")(text)]
        settings = self.rule(gate, facts, forget + retain) | {
            "gated": self.gate, "refusal": self._refusal(view),
            "asked": _unique(phrases + (blocked if self.answers == "both" else [])),
            "said": _unique(phrases + blocked),
        }  # fmt: skip
        wrapper = behind("refusing", gate, settings)
        model = wrapper.apply(view.model().cpu())
        assert isinstance(model, Refusing)
        facts |= {"phrases": len(settings["said"]), "shared_answers": shared}
        facts |= self._false_refusals(model, view, retain)
        return Outcome(model, wrapper, details=facts)

    def _answers(self, view: View) -> tuple[list[Tensor], int]:
        """Ways to write the answers to forget, and how many are left out since they are kept too."""
        if self.answers == "none":
            return [], 0
        end = view.capability("without_end")
        gone, kept = (
            [ids for batch in side.batches(256) for ids in end(batch)]
            for side in (view.forget, view.retain)
        )
        known = {tuple(ids.tolist()) for ids in kept}
        own = [ids for ids in gone if len(ids) and tuple(ids.tolist()) not in known]
        ways = [way for ids in own for way in view.capability("spellings")(ids)]
        return ways, len(gone) - len(own)

    def _refusal(self, view: View) -> list[int]:
        """Token ids of the refusal, ended as the data's answers are."""
        batch = next(view.forget.batches(1))
        said = view.capability("replied")(batch, [self.refusal or shipped_refusals()[0]])
        return unpadded(said)[0].answer.tolist()

    @staticmethod
    def _false_refusals(model: Refusing, view: View, retain: list[Tensor]) -> dict[str, Any]:
        """Samples to keep whose prompt is flagged, or whose answer could not be said."""
        asked = sum(model.flagged(prompt) for prompt in retain)
        said = sum(model.says(r.answer) for b in view.retain.batches(256) for r in unpadded(b))
        count = max(len(retain), 1)
        return {
            "false_refusals": {
                "samples": len(retain),
                "asked": asked / count,
                "said": said / count,
            }
        }


def _unique(phrases: list[Tensor]) -> list[list[int]]:
    """Each once, in a fixed order."""
    return [list(ids) for ids in sorted({tuple(p.tolist()) for p in phrases})]
