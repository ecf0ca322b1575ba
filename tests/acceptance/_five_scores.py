"""UA, MIA-efficacy, RA and TA in percent, as the card sparse-unlearn defines them."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.svm import SVC


@torch.no_grad()
def _confidence(problem, model, data, ids) -> tuple[np.ndarray, np.ndarray]:
    """True-class probability and correctness of each sample."""
    batch = data.fetch(ids)
    p = problem.logits(model.eval(), batch).softmax(1)
    return p.gather(1, batch.y[:, None])[:, 0].numpy(), p.argmax(1).eq(batch.y).numpy()


def five_scores(problem, request, model, members: int | None = None) -> dict[str, float]:
    """Scores of one model; the test set is without the forgotten class, if it is one.

    The attacker's members are the first retain samples, or with a seed `members` random ones: the
    first ones of data that is sorted by class are of a few classes only.
    """
    split = problem.split(request)
    forget, forget_right = _confidence(problem, model, problem.train, split["forget-train"])
    retain, retain_right = _confidence(problem, model, problem.train, split["retain-train"])
    test, test_right = _confidence(problem, model, problem.test, split["retain-test"])
    known = retain if members is None else np.random.default_rng(members).permutation(retain)
    x = np.concatenate([known[: len(test)], test])[:, None]
    y = [1] * len(test) + [0] * len(test)
    attack = SVC(C=3, gamma="auto", kernel="rbf").fit(x, y)
    return {
        "UA": 100 * (1 - float(forget_right.mean())),
        "MIA": 100 * float((attack.predict(forget[:, None]) == 0).mean()),
        "RA": 100 * float(retain_right.mean()),
        "TA": 100 * float(test_right.mean()),
    }


def over_seeds(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each score."""
    return {k: float(np.mean([row[k] for row in rows])) for k in rows[0]}
