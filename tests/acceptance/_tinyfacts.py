"""TinyFacts as the cards of language models use it: common settings, figures, and relearning."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from expunge.audits._intervals import auc as area
from expunge.audits._tokens import answers
from expunge.audits.memorisation import Memorisation
from expunge.audits.text_membership import TextMembership

STEPS = {
    "epochs": 60, "lr": 5e-4, "batch_size": 20, "rehearse": 2, "warmup": 0.0, "decay": "none",
}  # fmt: skip
"""A step has all 20 forget questions and 40 retain questions, at a constant rate."""


def figures(subject, runtime) -> dict[str, float]:
    """Probability and exact memorisation of forget answers, that of retain answers, and AUCs.

    `auc` is of the mean log p of forget answers against those never trained, their end left out, as the audit
    has it; `auc, end` counts the end in, as OpenUnlearning does and the cards' figures with it.
    """
    found = {
        f.name: f
        for audit in (Memorisation(), TextMembership(scores=("loss",)))
        for f in audit.run(subject, [], runtime)
    }
    auc = found["text-membership/auc-loss"]
    return {
        "probability": found["memorisation/probability-forget-train"].value,
        "forget": found["memorisation/exact-forget-train"].value,
        "retain": found["memorisation/exact-retain-train"].value,
        "auc": auc.detail.get("auc", auc.value),
        "auc, end": area(*(
            np.array([a.mean for a in answers(subject, split, 16)])
            for split in ("forget-train", "retain-test")
        )),
    }  # fmt: skip


@torch.no_grad()
def exact(problem, model: nn.Module, ids: Tensor) -> float:
    """Share of the answers' tokens, their end left out, that the model would say after the right ones."""
    batch = problem.train.fetch(ids)
    right = problem.token_logits(model, batch)[:, :-1].argmax(-1) == batch.y[:, 1:]
    answered = (batch.y[:, 1:] >= 0) & ~torch.isin(batch.y[:, 1:], torch.tensor(problem.ends()))
    return float(right[answered].double().mean())


def relearnt(
    problem, model: nn.Module, ids: Tensor, looked_at: Tensor, at: Sequence[int], lr: float
) -> list[float]:
    """Exact memorisation of some samples after steps of training on others, all of them each time.

    Args:
        problem: whose samples they are.
        model: is left as it is.
        ids: of samples that are learnt.
        looked_at: ids of samples to be asked about.
        at: steps after which they are, ascending.
        lr: of AdamW, whose gradients have a norm of 1 at most, without decay.

    Returns:
        One share for each of `at`.
    """
    model = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    batch, found = problem.train.fetch(ids), []
    for step in range(max(at) + 1):
        if step in at:
            found.append(exact(problem, model, looked_at))
        nll, mask = problem.token_nll(model, batch)
        optimizer.zero_grad()
        (nll.sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return found
