from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from expunge.audits import _scores

P = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5]], dtype=torch.double)
Y = torch.tensor([0, 1])


def test_modified_entropy_by_hand():
    first = -(0.3 * math.log(0.7)) - 0.2 * math.log(0.8) - 0.1 * math.log(0.9)
    second = -(0.7 * math.log(0.3)) - 0.2 * math.log(0.8) - 0.5 * math.log(0.5)
    wanted = [-first, -second]
    assert _scores.modified_entropy(P.log(), Y).tolist() == pytest.approx(wanted, abs=1e-12)


def test_modified_entropy_tells_right_from_wrong_where_entropy_does_not():
    logits = torch.tensor([[5.0, 0.0], [5.0, 0.0]])
    labels = torch.tensor([0, 1])
    entropies = _scores.entropy(logits, labels)
    right, wrong = _scores.modified_entropy(logits, labels)
    assert float(entropies[0]) == float(entropies[1])
    assert float(right) > -0.1 and float(wrong) < -4


def test_entropy_loss_confidence_correctness_by_hand():
    entropy = [-sum(-p * math.log(p) for p in row) for row in P.tolist()]
    assert _scores.entropy(P.log(), Y).tolist() == pytest.approx(entropy, abs=1e-12)
    assert torch.allclose(_scores.loss(P.log(), Y), -cross_entropy(P.log(), Y, reduction="none"))
    assert _scores.confidence(P.log(), Y).tolist() == pytest.approx([0.7, 0.3])
    assert _scores.correctness(P.log(), Y).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("name", list(_scores.SCORES))
def test_scores_stay_finite_and_ordered_on_saturated_logits(name):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]])
    scores = _scores.SCORES[name](logits, torch.zeros(3, dtype=torch.long))
    assert bool(torch.isfinite(scores).all())
    if name not in ("entropy", "correctness"):
        assert scores.argsort(descending=True).tolist() == [0, 2, 1]


def test_modified_entropy_where_one_minus_p_vanishes():
    # p = (1 − 1e-30, 1e-30): 1 − p computed from p is 0 and its logarithm −∞
    logits = torch.tensor([[0.0, 30 * math.log(0.1)]]).double()
    wrong = float(_scores.modified_entropy(logits, torch.tensor([1])))
    assert wrong == pytest.approx(60 * math.log(0.1), rel=1e-9)
    assert float(_scores.modified_entropy(logits, torch.tensor([0]))) == pytest.approx(0, abs=1e-15)
