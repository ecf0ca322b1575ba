r"""Per-token quantities of causal language models, aligned: position t predicts token t + 1.

\(\ell_t = -\log p_\theta(y_t \mid y_{<t})\) at answered tokens; positions without an answered token
give 0 and no gradient. Everything is computed in float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from expunge.core.runtime import Runtime

IGNORED = -100
"""Label of a token without a loss, as transformers has it."""


def targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Next tokens [B, T−1] (0 where none is answered) and where one is answered, of labels [B, T]."""
    following = labels[:, 1:]
    mask = following != IGNORED
    return following.masked_fill(~mask, 0), mask


def token_nll(
    logits: Tensor, labels: Tensor, columns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each answered token.

    Args:
        logits: [B, T, V], or [B, C, V] at some positions.
        labels: [B, T], `IGNORED` where a token is not answered.
        columns: those positions [C], which hold all that predict an answered token.

    Returns:
        ℓ [B, T−1] in nats, 0 where nothing is answered, and the mask [B, T−1].
    """
    following = labels[:, 1:]
    mask = following != IGNORED
    here, asked = (
        (logits[:, :-1], following) if columns is None else (logits, following[:, columns])
    )
    # rows of words side by side: over a dimension in the middle it takes twice as long
    found = cross_entropy(
        here.reshape(-1, logits.shape[-1]).float(),
        asked.reshape(-1),
        reduction="none",
        ignore_index=IGNORED,
    ).view(asked.shape)
    if columns is None:
        return found, mask
    return found.new_zeros(following.shape).index_copy(1, columns, found), mask


def predicting(labels: Tensor) -> Tensor:
    """Positions [C] that predict an answered token in any row of labels [B, T]; at least one."""
    found = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]
    return found if len(found) else found.new_zeros(1)


def nll_of(
    model: nn.Module, labels: Tensor, logits: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """`token_nll` of what a model is asked for: logits at the answers alone where it can give them.

    Args:
        model: takes `logits_to_keep`, or gives logits at all positions.
        labels: [B, T].
        logits: asks the model, with these keyword arguments besides.
    """
    columns = predicting(labels) if takes_positions(model) else None
    some = {} if columns is None else {"logits_to_keep": columns}
    return token_nll(logits(**some), labels, columns)


def takes_positions(model: nn.Module) -> bool:
    """Whether a model can be asked for logits at some positions alone, as those of transformers."""
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters


def answered(values: Tensor, labels: Tensor) -> Tensor:
    """Rows [n, …] of values [B, T, …] at positions that predict an answered token."""
    return values[:, :-1][labels[:, 1:] != IGNORED]


def sequence_sum(nll: Tensor) -> Tensor:
    r"""\(N = \sum_t \ell_t\) [B] of per-token values [B, T−1] that are 0 outside of answers."""
    return nll.sum(1)


def sequence_mean(nll: Tensor, mask: Tensor) -> Tensor:
    r"""\(N / |y|\) [B]."""
    return nll.sum(1) / mask.sum(1).clamp(min=1)


def token_mean(values: Tensor, mask: Tensor | None, runtime: Runtime) -> Tensor:
    """Mean over the answered tokens of the *whole* batch, whatever share this process holds.

    Without a mask every value is one of an answered token.

    Gradients are averaged over P processes, so a share's sum is scaled by P over all tokens.
    """
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    count = runtime.sum(mask.sum().float())
    return (values * mask).sum() * (runtime.processes / count.clamp(min=1))


def kl_each_token(teacher: Tensor, student: Tensor) -> Tensor:
    r"""\(\mathrm{KL}(p_{teacher} \| p_{student})\) [n] over the vocabulary, of logits [n, V]."""
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def entropy_each_token(teacher: Tensor, student: Tensor) -> Tensor:
    r"""Cross-entropy \(H(p_{teacher}, p_{student})\) [n], of logits [n, V]."""
    return -(teacher.float().softmax(-1) * student.float().log_softmax(-1)).sum(-1)


def without(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logits [n, V] with those of one token each at −∞."""
    return logits.scatter(-1, tokens[:, None], -torch.inf)
