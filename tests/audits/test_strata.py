"""Findings broken down by strata: the same audit on a part of the training samples."""

from __future__ import annotations

import pytest
import torch

import expunge as xp
from expunge.audits.accuracy import Accuracy
from expunge.audits.divergence import Divergence
from expunge.audits.membership import Membership
from expunge.audits.run import run_audits
from expunge.core.errors import UserError
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.strata import Strata
from expunge.report.verdict import decisive, row_verdict

RUNTIME = Runtime(threads=1)
STRATA = Strata({"easy": torch.arange(0, 60), "hard": torch.arange(60, 120)})


@pytest.fixture
def found(tables, margins, by_name):
    """40 of 120 samples are forgotten, 30 easy and 10 hard ones."""
    draw = torch.Generator().manual_seed(0)
    y, y_test = torch.arange(120) % 2, torch.arange(60) % 2
    every = torch.cat([y, y_test])
    ids = (*range(30), *range(60, 70))

    def logits(hard):
        odds = torch.randn(180, generator=draw) + 1.0
        odds[60:120] += hard
        return margins(every, odds)

    subject, *references = tables(
        y, y_test, Request(ids=ids), logits(0), logits(-2), logits(-1), logits(-1)
    )[1:]

    def run(*audits, strata=STRATA):
        return by_name(run_audits(subject, references, audits, RUNTIME, strata))

    run.subject, run.references = subject, references
    return run


def test_accuracy_of_each_stratum_by_hand(found):
    findings = found(Accuracy())
    right = findings["accuracy/forget-train"].per_sample["correct"]
    theirs = [
        (r.logits("forget-train").argmax(1) == r.labels("forget-train")).double()
        for r in found.references
    ]
    for stratum, part in (("easy", slice(0, 30)), ("hard", slice(30, 40))):
        one = findings[f"accuracy/forget-train@{stratum}"]
        assert one.value == pytest.approx(right[part].mean())
        assert one.reference == pytest.approx(float(sum(t[part].mean() for t in theirs) / 2))
        assert one.low < one.value < one.high
        assert one.original is not None and one.detail["n"] == len(right[part])
    assert (
        findings["accuracy/forget-train@hard"].value < findings["accuracy/forget-train@easy"].value
    )
    whole = findings["accuracy/forget-train"]
    parts = [findings[f"accuracy/forget-train@{s}"] for s in ("easy", "hard")]
    assert whole.value == pytest.approx((30 * parts[0].value + 10 * parts[1].value) / 40)


def test_the_whole_is_as_without_strata_and_test_samples_have_none(found):
    audits = (Accuracy(), Divergence(), Membership(attackers=("logistic",)))
    plain, broken = found(*audits, strata=None), found(*audits)
    assert {n: f for n, f in broken.items() if "@" not in n} == plain
    names = {n for n in broken if "@" in n}
    assert not {n for n in names if "-test@" in n}
    wanted = {"accuracy/forget-train", "accuracy/retain-train", "divergence/js-forget-train"}
    wanted |= {"divergence/kl-forget-train", "membership/efficacy-logistic"}
    wanted |= {f"membership/auc-{s}" for s in ("loss", "confidence", "entropy", "modified-entropy", "correctness")}  # fmt: skip
    assert names == {f"{n}@{s}" for n in wanted for s in ("easy", "hard")}


def test_attackers_are_fitted_on_the_whole(found):
    findings = found(Membership(attackers=("logistic",)))
    called = findings["membership/efficacy-logistic"].per_sample["nonmember"]
    hard = findings["membership/efficacy-logistic@hard"]
    assert (hard.per_sample["nonmember"] == called[30:]).all()
    assert hard.detail["fitted_on"] == findings["membership/efficacy-logistic"].detail["fitted_on"]
    few = Strata({"a": torch.arange(5), "b": torch.arange(5, 120)})
    findings = found(Membership(attackers=()), strata=few)
    assert findings["membership/auc-loss@a"].value is None
    assert "only 5 samples" in findings["membership/auc-loss@a"].reason
    assert findings["membership/auc-loss@b"].value is not None


def test_a_stratum_without_forgotten_samples_says_so(found):
    strata = Strata({"some": torch.arange(0, 80), "none": torch.arange(80, 120)})
    findings = found(Accuracy(), strata=strata)
    assert findings["accuracy/forget-train@none"].value is None
    assert "no sample" in findings["accuracy/forget-train@none"].reason
    whole = findings["accuracy/forget-train"]
    assert findings["accuracy/forget-train@some"].value == whole.value


def test_narrowing_takes_outputs_from_the_whole(found):
    part = found.subject.within(torch.arange(60, 120))
    assert part.splits["forget-train"].tolist() == list(range(60, 70))
    assert part.splits["retain-test"].tolist() == found.subject.splits["retain-test"].tolist()
    torch.testing.assert_close(
        part.logits("forget-train"), found.subject.logits("forget-train")[30:]
    )
    assert (
        part.labels("forget-train").tolist() == found.subject.labels("forget-train")[30:].tolist()
    )
    narrower = part.within(torch.arange(60, 65))
    assert narrower.whole is found.subject
    assert len(part.original().logits("forget-train")) == 10


def test_what_strata_must_be():
    for bad in (
        {"one": [1, 2]},
        {"a": [1, 2], "b": [2, 3]},
        {"a@b": [1], "c": [2]},
        {"a b": [1], "c": [2]},
        3,
    ):
        with pytest.raises(UserError):
            Strata.of(bad)
    assert Strata.of({"a": [2, 1], "b": [3]}).parts["a"].tolist() == [1, 2]
    assert Strata({"a": torch.tensor([1]), "b": torch.tensor([2])}).key() != STRATA.key()


def test_comparison_by_difficulty(digits, tmp_path):
    hard = xp.difficulty(digits, "el2n", runs=2, epoch=1, runtime=RUNTIME)
    store = xp.Store.open(tmp_path)
    options = {"references": 2, "audits": ["accuracy"], "store": store, "runtime": RUNTIME}
    request = xp.forget(fraction=0.2, seed=1)
    plain = xp.compare(digits, request, ["finetune"], **options)
    broken = xp.compare(digits, request, ["finetune"], strata=hard, **options)
    sizes = broken.data["comparisons"][0]["strata"]["forget"]
    assert sum(sizes.values()) == 240 and set(sizes) == {"easy", "medium", "hard"}
    original = broken.rows[0]["findings"]
    gaps = [original[f"accuracy/forget-train@{s}"]["gap"] for s in ("easy", "hard")]
    assert gaps[0] < gaps[1]  # what retraining gets wrong are the hard ones
    for before, after in zip(plain.rows, broken.rows, strict=True):
        assert row_verdict(before) == row_verdict(after)
        assert decisive(before) == decisive(after)
    broken.report(tmp_path / "report")
    assert "forget-train@hard" in (tmp_path / "report" / "report.json").read_text()
    outcome = xp.unlearn(digits, request, xp.methods.FineTune(epochs=1), runtime=RUNTIME)
    findings = xp.audit(outcome, ["accuracy"], strata=hard, references=2, store=store, runtime=RUNTIME)  # fmt: skip
    assert any(f.name == "accuracy/retain-train@medium" and f.reference for f in findings)
