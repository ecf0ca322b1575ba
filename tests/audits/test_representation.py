"""The invariants of the card truly-forgetting, and the audit on small networks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from expunge.audits._representation import (
    debiased_cka,
    feature_agreement,
    halves,
    harmonic,
    logit_agreement,
    neighbours_right,
    probe_right,
)
from expunge.audits.cka import gram, linear_cka
from expunge.audits.representation import Representation
from expunge.core.audit import Subject
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.problems.classification import Classification


def raw(x):
    return x.double() @ x.double().T


def features(seed, n=80, d=12):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_truly_forgetting_invariant_1_alignment():
    x, y = features(0), features(1)
    y = x @ torch.randn(12, 12, generator=torch.Generator().manual_seed(2)) + 0.3 * y
    turn = torch.linalg.qr(features(3, 12, 12))[0]
    stretch = torch.diag(torch.linspace(0.05, 6, 12))
    for cka in (
        lambda a, b: debiased_cka(raw(a), raw(b)),
        lambda a, b: linear_cka(gram(a), gram(b)),
    ):
        same = cka(x, y)
        assert cka(x, x) == pytest.approx(1)
        assert cka(x @ turn, y) == pytest.approx(same, abs=1e-5)
        assert cka(3 * x, y) == pytest.approx(same, abs=1e-5)
        assert cka(x + 5, y) == pytest.approx(same, abs=1e-4)
        assert cka(y, x) == pytest.approx(same)
        assert abs(cka(x @ stretch, y) - same) > 0.02
        assert 0 <= same <= 1


def by_definition(a, b):
    """The unbiased HSIC as sums over distinct samples."""
    import itertools

    n, k, m = len(a), raw(a).numpy(), raw(b).numpy()
    pairs = np.mean([k[i, j] * m[i, j] for i, j in itertools.permutations(range(n), 2)])
    triples = np.mean([k[i, j] * m[i, q] for i, j, q in itertools.permutations(range(n), 3)])
    fours = np.mean(
        [k[i, j] * m[q, r] for i, j, q, r in itertools.permutations(range(n), 4)]
    )  # fmt: skip
    return pairs - 2 * triples + fours


def test_truly_forgetting_invariant_2_debiased_alignment():
    x, y = features(0, 8, 3), features(1, 8, 5)
    wanted = by_definition(x, y) / (by_definition(x, x) * by_definition(y, y)) ** 0.5
    assert debiased_cka(raw(x), raw(y)) == pytest.approx(wanted, abs=1e-9)
    wide = [debiased_cka(raw(features(n, 60, 400)), raw(features(n + 50, 60, 400))) for n in range(20)]  # fmt: skip
    assert abs(np.mean(wide)) < 0.03
    biased = [linear_cka(gram(features(n, 60, 400)), gram(features(n + 50, 60, 400))) for n in range(5)]  # fmt: skip
    assert np.mean(biased) > 0.7
    assert debiased_cka(raw(torch.ones(20, 3)), raw(features(0, 20, 3))) == 0


def test_truly_forgetting_invariant_3_agreement():
    same = {"forget-train": 0.3, "retain-train": 0.9}
    assert logit_agreement(same, same) == feature_agreement(1.0, 0.4, 0.4) == harmonic(1, 1) == 1
    other = {"forget-train": 0.5, "retain-train": 0.8}
    assert logit_agreement(same, other) == pytest.approx(0.8 * 0.9)
    assert feature_agreement(0.5, 0.9, 0.7) == pytest.approx(0.4)
    assert harmonic(0.0, 0.9) == harmonic(0.9, 0.0) == harmonic(0, 0) == 0
    for a, b in ((0.2, 0.9), (0.5, 0.6)):
        assert harmonic(a, b) <= 2 * min(a, b)
        assert harmonic(a, b) == pytest.approx(1 / ((1 / a + 1 / b) / 2))
    assert feature_agreement(-0.02, 0.4, 0.4) == 0


def test_truly_forgetting_invariant_5_neighbours():
    x, y = features(0), torch.arange(80) % 3
    known, asked = halves(y, 0.8, torch.Generator().manual_seed(1))
    assert len(known) == 64 and len(torch.cat([known, asked]).unique()) == 80
    found = neighbours_right(x, y, known, asked, 5)
    sizes = torch.rand(80, 1, generator=torch.Generator().manual_seed(2)) + 0.1
    assert np.array_equal(neighbours_right(x * sizes, y, known, asked, 5), found)
    own = x.clone()
    own[:, 0] += 50.0 * (y == 1) - 50.0 * (y == 2)
    own[:, 1] += 50.0 * (y == 0)
    assert neighbours_right(own, y, known, asked, 5).all()
    assert probe_right(own, y, known, asked).all()
    assert found.mean() < 0.7


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 4))


def blobs(n, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 4
    centres = 2 * torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    return centres[y] + torch.randn(n, 6, generator=generator), y


@pytest.fixture
def subjects():
    """The original, and others of which the last has the original's features under a new head."""
    problem = Classification(net(0), blobs(160, 0), blobs(240, 1))
    head = copy.deepcopy(problem.model)
    with torch.no_grad():
        head[2].weight[:2] = 0
        head[2].bias[:2] = -20
    models = [problem.model, net(1), net(2), net(3), head]
    request = Request(label=(0, 1))
    return [Subject(m, problem, request, Runtime()) for m in models]


def test_truly_forgetting_invariant_4_a_new_head_leaves_the_features(subjects, by_name):
    audit = Representation()
    found = by_name(audit.run(subjects[4], subjects[1:3], Runtime()))
    before = by_name(audit.run(subjects[0], subjects[1:3], Runtime()))
    assert found["representation/cka-original"].value == pytest.approx(1, abs=1e-9)
    for what in ("knn", "probe"):
        f = found[f"representation/{what}"]
        assert f.value == before[f"representation/{what}"].value == f.original
    assert found["representation/agl"].value != before["representation/agl"].value


def test_labels_may_be_known_of_training_samples(subjects, by_name):
    mine, theirs = subjects[1], subjects[2:4]
    part, found = (
        by_name(Representation(known=known).run(mine, theirs, Runtime()))
        for known in ("part", "training")
    )
    for what in ("knn", "probe"):
        assert part[f"representation/{what}"].detail["asked"] == 24
        assert (
            found[f"representation/{what}"].detail["asked"] == 120
        )  # all test samples of two classes
    for what in ("agl", "cka-original"):  # features are still those of the test samples
        assert found[f"representation/{what}"].value == part[f"representation/{what}"].value
    ids = [mine.splits[f"forget-{side}"] for side in ("train", "test")]
    data = mine.problem.train, mine.problem.test
    z = torch.cat([
        mine.model[1](mine.model[0](d.fetch(i).x)).detach() for d, i in zip(data, ids, strict=True)
    ])
    y = torch.cat([d.labels_of(i) for d, i in zip(data, ids, strict=True)])
    known, asked = torch.arange(len(z)).split([len(i) for i in ids])
    right = {
        "knn": neighbours_right(z, y, known, asked, 5),
        "probe": probe_right(z, y, known, asked),
    }
    for what, hits in right.items():
        assert found[f"representation/{what}"].value == pytest.approx(hits.mean())
    single = [Subject(s.model, s.problem, Request(label=(0,)), Runtime()) for s in (mine, *theirs)]
    one = by_name(Representation(known="training").run(single[0], single[1:], Runtime()))
    assert one["representation/knn"].detail["asked"] == 60  # queries of that class, among all


def test_probes_do_not_depend_on_the_unit():
    x, y = features(0), torch.arange(80) % 3
    known, asked = halves(y, 0.8, torch.Generator().manual_seed(1))
    found = probe_right(x, y, known, asked)
    for scale, shift in ((1e3, 0.0), (1e-3, 5.0)):
        assert np.array_equal(probe_right(x * scale + shift, y, known, asked), found)


def test_scores_by_hand(subjects, by_name):
    mine, first, second = subjects[1:4]
    found = by_name(Representation(estimator="linear").run(mine, [first, second], Runtime()))
    splits = ("forget-train", "retain-train", "forget-test", "retain-test")

    def accuracies(s):
        return [float((s.logits(k).argmax(1) == s.labels(k)).double().mean()) for k in splits]

    def agl(a, b):
        return np.prod([1 - abs(p - q) for p, q in zip(accuracies(a), accuracies(b), strict=True)])

    f = found["representation/agl"]
    assert f.value == pytest.approx(np.mean([agl(mine, first), agl(mine, second)]))
    assert f.reference == pytest.approx(agl(first, second))
    assert f.direction == "up" and f.floor is None
    assert f.low <= f.value <= f.high
    x = mine.problem.test.fetch(mine.splits["forget-test"]).x
    hidden = [s.model[1](s.model[0](x)).detach() for s in (mine, first, second)]
    cka = [linear_cka(gram(hidden[0]), gram(h)) for h in hidden[1:]]
    assert f.detail["cka"] == pytest.approx(np.mean(cka), abs=1e-5)


def test_of_itself_everything_agrees(subjects, by_name):
    found = by_name(Representation().run(subjects[1], [subjects[1]], Runtime()))
    for what in ("agl", "agr", "h-lr"):
        f = found[f"representation/{what}"]
        assert f.value == pytest.approx(1)
        assert f.reference is None and "one reference" in f.reason


def test_of_one_class_its_queries_count_among_all(by_name):
    problem = Classification(net(0), blobs(160, 0), blobs(240, 1))
    one, other = (Subject(net(s), problem, Request(label=2), Runtime()) for s in (1, 2))
    f = by_name(Representation().run(one, [other], Runtime()))["representation/knn"]
    assert 10 <= f.detail["asked"] <= 20
    assert f.value < 1


@pytest.mark.parametrize(
    ("request_", "why"),
    [(Request(ids=(0, 1, 2)), "no whole class"), (Request(label=1), "10 are needed")],
)
def test_what_cannot_be_measured_says_why(request_, why, by_name):
    problem = Classification(net(0), blobs(160, 0), blobs(40, 1))
    subject = Subject(net(1), problem, request_, Runtime())
    for f in Representation().run(subject, [], Runtime()):
        assert f.value is None and why in f.reason


def test_downstream_data_is_read_from_disk(tmp_path, by_name):
    x, y = blobs(120, 4)
    np.savez(tmp_path / "other.npz", X=x.numpy()[:, None, None], y=y.numpy())

    class Flat(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.flatten(1))

    problem = Classification(Flat(net(0)), blobs(160, 0), blobs(240, 1))
    subjects = [Subject(Flat(net(s)), problem, Request(label=2), Runtime()) for s in (1, 2)]
    audit = Representation(downstream=str(tmp_path / "other.npz"))
    f = by_name(audit.run(subjects[0], subjects[1:], Runtime()))["representation/knn"]
    assert f.detail == {"asked": 24, "data": str(tmp_path / "other.npz")}


def test_features_that_are_not_finite_say_so(subjects):
    with torch.no_grad():
        subjects[1].model[0].weight[0] = torch.nan
    for f in Representation().run(subjects[1], subjects[2:3], Runtime()):
        assert f.value is None and "NaN" in f.reason


def test_the_interval_does_not_hang_on_the_order_of_the_samples():
    from expunge.audits.representation import GROUPS, _groups

    labels = np.arange(200) % 10
    for group in range(GROUPS):
        out = labels[_groups(200).numpy() == group]
        assert len(out) == 20
        assert len(set(out)) > 4, "a group is a class"


def test_findings_follow_the_downstream_data(tmp_path, subjects):
    x, y = blobs(40, 4)
    path = tmp_path / "other.npz"
    np.savez(path, X=x.numpy()[:, None, None], y=y.numpy())
    audit = Representation(downstream=str(path))
    before = audit.reads()
    np.savez(path, X=x.numpy()[:, None, None] + 1, y=y.numpy())
    assert audit.reads() != before
    assert Representation().reads() == []


def test_downstream_data_of_one_class_says_so(monkeypatch, subjects):
    from expunge.audits import representation
    from expunge.core.data import Data

    one = Data((blobs(40, 4)[0], torch.zeros(40, dtype=torch.long)))
    monkeypatch.setattr(representation, "_read", lambda path: one)
    for f in Representation(downstream="x").run(subjects[1], subjects[2:3], Runtime()):
        assert f.value is None and "one class" in f.reason


def test_a_split_of_a_few_samples_is_left_out_of_the_scores(by_name):
    x, y = blobs(160, 0)
    keep = (y != 2) | (torch.arange(160) == 2)
    problem = Classification(net(0), (x[keep], y[keep]), blobs(240, 1))
    one, other = (Subject(net(s), problem, Request(label=2), Runtime()) for s in (1, 2))
    f = by_name(Representation().run(one, [other], Runtime()))["representation/agl"]
    assert "forget-train" not in f.detail["splits"]
    assert 0 < f.low <= f.value <= f.high
