r"""PDU: flatten the logits on the forget answers while the loss on the rest stays below a limit.

\[
\min_\theta\; \mathrm{mean}_t \big(\max_v z_v - \mathrm{mean}_v\, z_v\big)^2
\quad\text{so that}\quad L_{retain} \le \varepsilon
\]

over the tokens t of forget answers, z the logits that predict them. Descent on
\(\gamma L_{forget} + \alpha L_{retain}\) takes turns with ascent on the dual variable,
\(\alpha \leftarrow \max(0, \alpha + \eta_\alpha (L_{retain} - \varepsilon))\), once warm-up is over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import SettingError
from expunge.core.needs import Card, Deviation
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train.fit import Fit, Loss, Pass
from expunge.train.text import Text, TextTraining
from expunge.train.token_losses import answered

_STATE = "dual_state"


@dataclass(frozen=True, kw_only=True)
class PDU(TextTraining):
    """Primal-dual descent with the retain loss as a constraint."""

    name: ClassVar[str] = "pdu"
    search: ClassVar = {"lr": None, "epochs": None, "epsilon": None}
    card: ClassVar[Card] = Card(
        title="Constrained Entropic Unlearning: A Primal-Dual Framework for Large Language Models",
        authors="Entesari, Hatami, Khaziev, Ramakrishna, Fazlyab",
        year=2025,
        link="https://arxiv.org/abs/2506.05314",
        idea="Flatten the logits on the forget answers under a limit on the loss of the rest.",
        deviations=(
            Deviation(
                "Logits are those that predict answered tokens; public code takes the position of "
                "the token itself.",
                "tests/methods/text/test_pdu.py::test_flatness_is_taken_where_answers_are_predicted",
            ),
        ),
    )

    lr: float = setting(1e-5, "learning rate of the weights, η", above=0, source="OpenUnlearning")
    alpha: float = setting(50.0, "dual variable at the start, α", low=0, source="OpenUnlearning, 50 to 100")  # fmt: skip
    epsilon: float = setting(0.3, "limit of the retain loss in nats, ε; above its start", low=0, source="OpenUnlearning")  # fmt: skip
    dual_lr: float = setting(1.0, "step of the dual variable, η of α; 0 keeps it", low=0, source="OpenUnlearning")  # fmt: skip
    dual_warmup: int = setting(5, "passes in which the dual variable stays", low=0, source="OpenUnlearning")  # fmt: skip
    dual_update: Literal["step", "epoch"] = setting("step", "when it moves: each step, or each pass by the mean loss of the pass", source="OpenUnlearning")  # fmt: skip

    def __post_init__(self) -> None:
        """Check the settings; without a retain term there is no constraint."""
        super().__post_init__()
        if self.retain == "none":
            raise SettingError("pdu holds the retain loss below epsilon; retain is nll or kl")

    @property
    def keeps(self) -> bool:
        """Always: a dual variable of 0 may rise."""
        return True

    def forget_loss(self, model: nn.Module, batch: Batch, text: Text) -> Tensor:
        """How far the logits that predict the answers are from flat."""
        assert batch.y is not None
        each = flatness(answered(text.logits(model, batch), batch.y))
        return text.token_mean(each)

    def terms(self, text: Text) -> dict[str, Loss]:
        """Those of the Lagrangian; the dual variable moves after each loss."""
        steps = math.ceil(text.view.forget_count / self.batch_size)

        def constraint(model: nn.Module, batches: tuple[Batch, ...]) -> Tensor:
            state = next(b for name, b in model.named_buffers() if name.endswith(_STATE))
            retain = self.retain_loss(model, batches[1], text)
            dual = float(state[0])
            text.log(retain=retain, dual=dual)
            whole = text.runtime.sum(retain.detach().clone()) / text.runtime.processes
            state.copy_(torch.tensor(self.moved(state.tolist(), float(whole), steps)))
            return dual * retain

        return {"forget": super().terms(text)["forget"], "weighed": constraint}

    def moved(self, state: list[float], loss: float, steps: int) -> list[float]:
        """The state after a step: dual variable, steps so far, sum of retain losses of the pass.

        Args:
            state: before the step.
            loss: retain loss of the step.
            steps: steps a pass.
        """
        dual, done, total = state[0], state[1] + 1, state[2] + loss
        ends = done % steps == 0
        if done > self.dual_warmup * steps and (ends or self.dual_update == "step"):
            seen = loss if self.dual_update == "step" else total / steps
            dual = max(0.0, dual + self.dual_lr * (seen - self.epsilon))
        return [dual, done, 0.0 if ends else total]

    def train_model(
        self,
        model: nn.Module,
        passes: Callable[[int], Pass],
        view: View,
        runtime: Runtime,
        **options: Any,
    ) -> tuple[Outcome, Fit]:
        """Train with the dual variable beside the weights, so that checkpoints hold it."""
        device = next(model.parameters()).device
        state = torch.tensor([self.alpha, 0.0, 0.0], device=device)
        model.register_buffer(_STATE, state)
        try:
            outcome, result = super().train_model(model, passes, view, runtime, **options)
            outcome.details["dual"] = float(model.get_buffer(_STATE)[0])
        finally:
            delattr(model, _STATE)
        return outcome, result


def flatness(logits: Tensor) -> Tensor:
    r"""\((\max_v z_v - \mathrm{mean}_v\, z_v)^2\) [n] of logits [n, V]; 0 where all are equal."""
    z = logits.float()
    return (z.amax(-1) - z.mean(-1)).square()
