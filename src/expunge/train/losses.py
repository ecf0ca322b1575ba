"""Losses as plain functions of logits or predictions, one value a sample."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div, log_softmax

from expunge.core.errors import ModelError, SettingError


def kl_each(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Distillation divergence of each sample.

    \(T^2\, KL(\mathrm{softmax}(z_t/T) \,\|\, \mathrm{softmax}(z_s/T))\), the scaling of Hinton et
    al. (2015) that keeps gradients comparable over temperatures. Bounded below by 0.

    Args:
        teacher: logits \(z_t\) [B, C].
        student: logits \(z_s\) [B, C].
        temperature: \(T > 0\).

    Returns:
        Values [B] in nats.
    """
    p = log_softmax(teacher / temperature, dim=1)
    q = log_softmax(student / temperature, dim=1)
    return kl_div(q, p, reduction="none", log_target=True).sum(1) * temperature**2


def one_a_sample(output: Any, samples: int) -> Tensor:
    """Predictions [B] of an output [B] or [B, 1]: a forgotten dimension would broadcast to B × B.

    Raises:
        ModelError: the output has another shape.
    """
    if not isinstance(output, Tensor) or output.shape not in ((samples,), (samples, 1)):
        gave = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output)
        raise ModelError(
            f"a regressor gives one number a sample, [B] or [B, 1]; this model gave {gave}"
        )
    return output.reshape(samples)


def regression_each(prediction: Tensor, target: Tensor, loss: str) -> Tensor:
    r"""Regression loss of each sample, from the residual \(r = y - \hat y\).

    `l1`: \(|r|\); `mse`: \(r^2\); `quantile(q)`: \(\max(q r, (q-1) r)\), which is least at the
    q-quantile of the target. All are bounded below by 0 and taken in float32 at least.

    Args:
        prediction: \(\hat y\) [B].
        target: \(y\) [B].
        loss: name of the loss.

    Returns:
        Values [B].
    """
    quantile = quantile_of(loss)
    wide = torch.promote_types(prediction.dtype, torch.float32)
    residual = target.to(wide) - prediction.to(wide)
    if quantile is not None:
        return torch.maximum(quantile * residual, (quantile - 1) * residual)
    return residual.abs() if loss == "l1" else residual.square()


def quantile_of(loss: str) -> float | None:
    """The q of `quantile(q)`; None for `l1` and `mse`.

    Raises:
        SettingError: the loss has another name, or q does not lie between 0 and 1.
    """
    if loss in ("l1", "mse"):
        return None
    found = re.fullmatch(r"quantile\((0?\.\d+)\)", loss) if isinstance(loss, str) else None
    if found is None or not 0 < float(found[1]) < 1:
        raise SettingError(f"loss must be l1, mse or quantile(q) with 0 < q < 1, not {loss!r}")
    return float(found[1])


def margin_each(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Log-odds \(z_y - \log\sum_{c \ne y} e^{z_c}\) [B] of the labels; its sigmoid is \(p_y\).

    Args:
        logits: \(z\) [B, C].
        labels: y [B].

    Returns:
        Values [B], without bound on either side.
    """
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -float("inf"))
    return own.squeeze(1) - others.logsumexp(1)


def answers_of(code: Tensor, questions: int) -> Tensor:
    """Answers [B, K] of yes (1) and no (0) in labels [B] whose bit k answers question k."""
    places = torch.arange(questions, device=code.device)
    return (code[:, None] >> places) & 1


def questions_each(logits: Tensor, code: Tensor) -> Tensor:
    r"""Mean binary cross-entropy [B] over K questions, in nats: \(\frac1K\sum_k \mathrm{BCE}(\sigma(z_k), b_k)\).

    Args:
        logits: [B, K].
        code: labels [B], \(\sum_k 2^k b_k\).

    Returns:
        Values [B], bounded below by 0.
    """
    answers = answers_of(code, logits.shape[1]).to(logits.dtype)
    return binary_cross_entropy_with_logits(logits, answers, reduction="none").mean(1)
