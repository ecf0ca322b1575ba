"""UNSIR: invariant 6 of the card baselines-vision, as far as it is about noise."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from expunge.core.errors import DataError, NeedsError
from expunge.core.method import unlearn
from expunge.core.request import Request
from expunge.core.runtime import Budget, Runtime
from expunge.core.view import View
from expunge.methods.general.unsir import UNSIR
from expunge.problems.classification import Classification
from expunge.workloads.nets import SmallResNet

THREES = Request(label=(3,))
QUICK = {"copies": 4, "per_class": 20, "lr": 1e-3, "batch_size": 64}


def run(problem, method, request=THREES, **runtime):
    return unlearn(problem, request, method, runtime=Runtime(seed=0, threads=1, **runtime))


def noise_of(problem, method, request=THREES, seed=0):
    runtime = Runtime(seed=seed)
    view = View(problem, request, method.needs, runtime)
    return method.noise(view, list(request.label), runtime)


@pytest.fixture(scope="module")
def resnet_problem() -> Classification:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images[:120] / 16.0).float().reshape(-1, 1, 8, 8)
    torch.manual_seed(0)
    return Classification(SmallResNet(width=4), (x, torch.from_numpy(labels[:120]).long()))


def test_baselines_vision_invariant_6_noise_loss_decreases(digits):
    losses = [noise_of(digits, UNSIR(noise_steps=n))[1][0] for n in (0, 5, 25, 100)]
    assert losses[0][0] == losses[0][1]
    assert len({first for first, _ in losses}) == 1
    last = [end for _, end in losses]
    assert last == sorted(last, reverse=True) and last[-1] < last[0]


def test_noise_drives_the_error_of_its_class_up(digits):
    """With the sign of the cross-entropy turned round the noise would become a three."""
    errors = []
    for steps in (0, 25):
        batch, _ = noise_of(digits, UNSIR(noise_steps=steps, noise_weight=0.0))
        assert tuple(batch.x.shape) == (32, 64) and batch.y.tolist() == [3] * 32
        with torch.no_grad():
            errors.append(float(digits.each_loss(digits.model, batch).mean()))
    assert errors[1] > max(10.0, 2 * errors[0])


def test_noise_is_held_short_by_its_weight(digits):
    lengths = [
        float(noise_of(digits, UNSIR(noise_weight=w, noise_steps=100))[0].x.square().sum(1).mean())
        for w in (0.0, 0.1, 10.0)
    ]
    assert lengths[0] > lengths[1] > 2 * lengths[2]


def test_unsir_shows_noise_as_the_class_and_no_forget_sample(digits, monkeypatch):
    shown: list[tuple[int, int]] = []
    true = Classification.each_loss

    def spy(self, model, batch):
        if model.training:
            shown.extend(zip(batch.ids.tolist(), batch.y.tolist(), strict=True))
        return true(self, model, batch)

    monkeypatch.setattr(Classification, "check", lambda self: None)
    monkeypatch.setattr(Classification, "each_loss", spy)
    outcome = run(digits, UNSIR(noise_size=8, epochs=1, repair_epochs=2, **QUICK))
    labels = dict(zip(digits.train.ids.tolist(), digits.train.labels.tolist(), strict=True))
    kept = 9 * 20
    impair, repair = shown[: 4 * 8 + kept], shown[4 * 8 + kept :]
    noise = [(i, y) for i, y in impair if i < 0]
    assert len(noise) == 4 * 8 and {y for _, y in noise} == {3} and len({i for i, _ in noise}) == 8
    samples = [(i, y) for i, y in impair if i >= 0]
    assert len(samples) == kept == outcome.details["rehearsed"]
    assert all(labels[i] == y != 3 for i, y in samples + repair)
    per_class = [sum(y == c for _, y in samples) for c in range(10)]
    assert per_class == [20, 20, 20, 0, 20, 20, 20, 20, 20, 20]
    assert sorted(repair) == sorted(samples * 2)
    first = {i < 0 for i, _ in impair[:40]}
    assert first == {True, False}  # shuffled together


def test_unsir_never_reads_a_forget_sample(digits):
    spoiled = copy.copy(digits)
    whole = digits.train.fetch(digits.train.ids)
    whole.x[torch.isin(whole.ids, THREES.resolve(digits.train))] = 0.5
    spoiled.train = type(digits.train)((whole.x, whole.y), ids=digits.train.ids)
    spoiled._hashes = {}
    method = UNSIR(**QUICK)
    assert not method.needs.forget and method.needs.labels == "retain"
    assert run(spoiled, method).record["weights"] == run(digits, method).record["weights"]


def test_unsir_noise_is_found_in_eval_mode(resnet_problem):
    problem, method = resnet_problem, UNSIR(noise_size=4, noise_steps=3)
    before = {k: v.clone() for k, v in problem.model.state_dict().items()}
    batch, ((first, last),) = noise_of(problem, method)
    start, _ = noise_of(problem, UNSIR(noise_size=4, noise_steps=0))
    for noise, wanted in ((start, first), (batch, last)):
        with torch.no_grad():
            loss = problem.each_loss(problem.model.eval(), noise).mean()
        length = noise.x.square().flatten(1).sum(1).mean()
        assert float(0.1 * length - loss) == pytest.approx(wanted, rel=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in problem.model.state_dict().items())


def test_unsir_forgets_several_classes(digits):
    both = Request(label=(5, 3))
    batch, losses = noise_of(digits, UNSIR(noise_size=4), both)
    assert sorted(set(batch.y.tolist())) == [3, 5] and len(losses) == 2
    tuned = digits.tuned["unsir"]
    outcome = run(digits, UNSIR(**tuned), both)
    asked = digits.test.ids[torch.isin(digits.test.labels, torch.tensor([3, 5]))]
    test = digits.test.fetch(asked)
    with torch.no_grad():
        right = digits.logits(outcome.model, test).argmax(1) == test.y
    assert float(right.float().mean()) < 0.2


def test_unsir_wants_whole_classes(digits):
    threes = tuple(THREES.resolve(digits.train).tolist())
    for request in (Request(fraction=0.1), Request(where="id < 100"), Request(ids=threes)):
        with pytest.raises(NeedsError, match="whole classes"):
            run(digits, UNSIR(), request)


def test_unsir_wants_inputs_that_noise_can_stand_for():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 3)

        def forward(self, x):
            return self.table(x).mean(1)

    y = torch.arange(12) % 3
    problem = Classification(Words(), (torch.randint(9, (12, 4)), y))
    with pytest.raises(DataError, match="real numbers"):
        run(problem, UNSIR(), Request(label=(1,)))


def test_stages_share_one_budget(digits):
    method = UNSIR(epochs=2, repair_epochs=2, noise_size=8, **QUICK)
    free = run(digits, method)
    cut = run(digits, method, budget=Budget(steps=free.details["steps"] - 1))
    assert cut.details["steps"] == free.details["steps"] - 1
    assert "budget" in cut.details["stopped"] and "stopped" not in free.details
    assert [p["step"] for p in free.curve] == sorted({p["step"] for p in free.curve})
