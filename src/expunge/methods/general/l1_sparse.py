r"""L1Sparse: fine-tune on the retain data while an ℓ1 penalty presses all weights towards zero.

\(\mathrm{mean}_{D_r} L(\theta) + \gamma_e \|\theta\|_1\) over all parameters, with
\(\gamma_e = \gamma\,(1 - e / (E - E_0))\) in epoch \(e = 0, 1, …\) and 0 in the last \(E_0\) epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from expunge.core.data import Batch
from expunge.core.errors import SettingError
from expunge.core.needs import Card, Deviation
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.methods.general.finetune import FineTune
from expunge.train.fit import Loss


@dataclass(frozen=True, kw_only=True)
class L1Sparse(FineTune):
    """`FineTune` with a penalty that fades; nothing is set to zero at the end.

    The next request starts from the weights this one left, and the penalty starts anew.
    """

    name: ClassVar[str] = "l1-sparse"
    search: ClassVar = {"epochs": None, "lr": None, "gamma": None}
    card: ClassVar[Card] = Card(
        title="Model Sparsity Can Simplify Machine Unlearning",
        authors="Jia, Liu, Ram, Yao, Liu, Liu, Sharma, Liu",
        year=2023,
        link="https://arxiv.org/abs/2304.04934",
        idea="A sparser model forgets more easily, so press weights to zero while fine-tuning.",
        deviations=(
            Deviation(
                "The constant and the increasing schedule of the penalty are settings; the released "
                "code has the decreasing one only.",
                "tests/methods/test_sparse_unlearn.py::test_sparse_unlearn_invariant_3_schedules",
            ),
        ),
    )

    weight_decay: float = setting(0.0, "L2 coefficient, beside the ℓ1 norm", low=0)
    gamma: float = setting(
        5e-4, "weight of the ℓ1 norm, γ", low=0, source="from memory of the paper"
    )
    penalty: Literal["decreasing", "constant", "increasing"] = setting(
        "decreasing",
        "γ over the epochs: linearly to 0, the same, or linearly from 0",
        source="paper",
    )
    plain_epochs: int = setting(0, "last epochs without a penalty, E₀", low=0, source="code")

    def __post_init__(self) -> None:
        """Check the settings; raises `SettingError` also if no epoch would have a penalty."""
        super().__post_init__()
        if self.plain_epochs >= self.epochs:
            raise SettingError(
                f"L1Sparse: plain_epochs must be below epochs ({self.epochs}), not {self.plain_epochs}"
            )

    def weight(self, epoch: int) -> float:
        """Weight of the ℓ1 norm in an epoch counted from 0."""
        length = self.epochs - self.plain_epochs
        if epoch >= length:
            return 0.0
        shares = {"decreasing": 1 - epoch / length, "constant": 1.0, "increasing": epoch / length}
        return self.gamma * shares[self.penalty]

    def objective(self, view: View, epoch: int) -> Loss:
        """Retain loss and penalty; without weight the penalty is not computed at all."""
        plain, weight = super().objective(view, epoch), self.weight(epoch)
        if not weight:
            return plain

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return plain(model, batch) + weight * l1_norm(model)

        return loss


def l1_norm(model: nn.Module) -> Tensor:
    """Sum of magnitudes of all trainable parameters: weights, biases and norm layers alike."""
    return torch.stack([vector_norm(p, 1) for p in model.parameters() if p.requires_grad]).sum()
