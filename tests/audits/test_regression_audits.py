"""regression-error and wasserstein on planted predictions; suites of both kinds of problem."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import expunge as xp
from expunge.audits.regression_error import RegressionError
from expunge.audits.run import audit_list, run_audits
from expunge.audits.wasserstein import Wasserstein, w1
from expunge.core.errors import NeedsError
from expunge.suite import checks

REQUEST = xp.Request(where="y > 6")


class Table(nn.Module):
    """A model that looks its predictions up by the input, which is the sample's number."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.as_tensor(values, dtype=torch.float32))

    def forward(self, x):
        return self.values[x.long()]


def subject(predictions, y=None, request=REQUEST):
    y = torch.arange(40) % 10 if y is None else y
    n = len(y) // 2
    x = torch.arange(len(y))
    p = xp.Regression(Table(y), (x[:n], y[:n]), (x[n:], y[n:]))
    return xp.Subject(Table(predictions), p, request, xp.Runtime(), cost=xp.Cost(seconds=1.0))


def by_name(findings):
    return {f.name: f for f in findings}


def test_errors_of_each_split_beside_the_references():
    y = (torch.arange(40) % 10).float()
    away = torch.where(y > 6, y - 3.0, y + 0.5)
    found = by_name(RegressionError().run(subject(away, y), [subject(y - 1.0, y)], xp.Runtime()))
    forget, kept = (
        found["regression-error/mae-forget-test"],
        found["regression-error/rmse-retain-train"],
    )
    assert (forget.value, forget.reference, forget.original) == (3.0, 1.0, 0.0)
    assert (kept.value, kept.reference) == (0.5, 1.0)
    assert forget.low <= 3.0 <= forget.high
    assert forget.detail["scale"] == pytest.approx(float(y[:20].std()))


def test_rmse_and_mae_differ_on_uneven_errors():
    y = torch.zeros(40)
    y[:4] = 10
    off = y + torch.tensor([0.0, 4.0] * 20)
    found = by_name(RegressionError().run(subject(off, y), [], xp.Runtime()))
    assert found["regression-error/mae-forget-train"].value == pytest.approx(2.0)
    assert found["regression-error/rmse-forget-train"].value == pytest.approx(np.sqrt(8))
    assert found["regression-error/mae-forget-test"].reason.startswith(
        "the test data has no sample"
    )


def test_w1_of_a_shift_and_of_an_exchange():
    assert w1(np.arange(5.0), np.arange(5.0) + 3) == 3
    assert w1(np.array([0.0, 5.0]), np.array([5.0, 0.0])) == 0
    y = (torch.arange(40) % 10).float()
    # predictions of the forgotten (7, 8, 9) turned around: the same distribution, other errors
    turned = torch.where(y > 6, 16 - y, y)
    found = by_name(Wasserstein().run(subject(turned, y), [subject(y, y)] * 2, xp.Runtime()))
    assert found["wasserstein/predictions-forget-train"].value == 0
    assert found["wasserstein/errors-forget-train"].value == pytest.approx(4 / 3)
    relative = found["wasserstein/relative-forget-train"]
    assert relative.value == pytest.approx((2 / 7 + 0 + 2 / 9) / 3)
    assert sum(relative.detail["histogram"]["share"]) == pytest.approx(1)
    assert relative.reference == 0


def test_without_references_there_is_a_reason():
    y = (torch.arange(40) % 10).float()
    assert all(f.reason for f in Wasserstein().run(subject(y, y), [], xp.Runtime()))


def test_targets_of_zero_have_no_relative_difference():
    y = torch.zeros(40)
    y[20:] = 1
    s = subject(y + 1, y, xp.Request(ids=(0, 1, 2)))
    found = by_name(Wasserstein().run(s, [s, s], xp.Runtime()))
    assert found["wasserstein/relative-forget-train"].reason == "all forgotten targets are 0"


def test_suites_leave_out_what_is_for_another_kind(digits, threes):
    s, first, second = checks._subjects("regression")
    names = {a.name for a in audit_list("standard", s.problem)}
    assert {"regression-error", "wasserstein", "residual-membership", "cka", "cost"} <= names
    assert not names & {"accuracy", "membership", "divergence", "prediction-matrix", "relearn-time"}
    theirs = {a.name for a in audit_list("standard", digits)}
    assert {"accuracy", "membership"} <= theirs
    assert not theirs & {"regression-error", "wasserstein", "residual-membership"}
    found = run_audits(s, [first, second], "standard", xp.Runtime())
    assert {"regression-error/mae-forget-test", "residual-membership/svc"} <= {
        f.name for f in found
    }
    assert all(f.value is not None or f.reason for f in found)


@pytest.mark.parametrize("name", ["accuracy", "membership", "divergence", "prediction-matrix"])
def test_audits_of_classes_give_a_reason_on_targets(name):
    s = subject(torch.arange(40) % 10)
    with pytest.raises(NeedsError, match="'logits'"):
        run_audits(s, [], name, xp.Runtime())
    (finding,) = run_audits(s, [], [xp.audits.registry.get(name)()], xp.Runtime())
    assert finding.value is None and "'logits'" in finding.reason


@pytest.mark.parametrize("name", ["regression-error", "wasserstein", "residual-membership"])
def test_audits_of_targets_give_a_reason_on_classes(name, digits, threes):
    s = xp.Subject(digits.model, digits, threes, xp.Runtime())
    (finding,) = run_audits(s, [], [xp.audits.registry.get(name)()], xp.Runtime())
    assert (
        finding.value is None and "which a classification problem does not offer" in finding.reason
    )
