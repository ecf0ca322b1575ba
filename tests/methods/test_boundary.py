"""BoundaryShrink and BoundaryExpand: invariant 6 of the card baselines-vision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from expunge.core.errors import DataError, NeedsError, SettingError
from expunge.core.method import unlearn
from expunge.core.pruned import keep_only, kept_of
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.methods.general.boundary_expand import BoundaryExpand, narrow, widen
from expunge.methods.general.boundary_shrink import BoundaryShrink
from expunge.problems.classification import Classification

THREES = Request(label=(3,))


def run(problem, method, request=THREES):
    return unlearn(problem, request, method, runtime=Runtime(seed=0, threads=1))


def view_of(problem, method, request=THREES):
    return View(problem, request, method.needs, Runtime(seed=0))


class Normalised(nn.Module):
    """The same classifier for inputs (x − mean) / std."""

    def __init__(self, inner, mean, std):
        super().__init__()
        self.inner, self.mean, self.std = inner, mean, std

    def forward(self, x):
        return self.inner(x * self.std + self.mean)


# ------------------------------------------------------------------ shrink


@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.4])
def test_baselines_vision_invariant_6_shrink_labels_differ_for_successful_attacks_only(
    digits, epsilon
):
    method = BoundaryShrink(epsilon=epsilon, levels=0)
    view = view_of(digits, method)
    ids, labels = method.nearest(view, Runtime(seed=0))
    batch = digits.train.fetch(ids)
    x = batch.x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(digits.model(x), batch.y, reduction="sum")
    moved = (batch.x + epsilon * torch.autograd.grad(loss, x)[0].sign()).clamp(0, 1)
    with torch.no_grad():
        reached = digits.model(moved).argmax(1)
    assert torch.equal(labels, reached)
    fooled = reached != batch.y
    assert torch.equal(labels[~fooled], batch.y[~fooled])
    outcome = run(digits, BoundaryShrink(epsilon=epsilon, levels=0, lr=1e-3, epochs=1))
    assert outcome.details["relabelled_share"] == pytest.approx(float(fooled.float().mean()))
    if epsilon == 0.1:
        assert 0 < int(fooled.sum()) < len(ids)


def test_boundary_shrink_attacks_within_pixels(digits):
    for levels in (16, 0):
        method = BoundaryShrink(epsilon=0.13, levels=levels)
        view = view_of(digits, method)
        batch = next(view.forget.batches(50))
        attacked = method.attacked(view, view.original(), batch).x
        assert float(attacked.min()) >= 0 and float(attacked.max()) <= 1
        step = (attacked - batch.x).abs()
        assert float(step.max()) <= 0.13 + (0.5 / 16 if levels else 1e-6) + 1e-6
        on_grid = (attacked * 16 - (attacked * 16).round()).abs().max() < 1e-5
        assert bool(on_grid) == (levels == 16)
        inside = (batch.x > 0.13) & (batch.x < 0.87)
        if not levels:
            torch.testing.assert_close(step[inside], torch.full_like(step[inside], 0.13))


def test_boundary_shrink_means_pixels_whatever_the_normalisation(digits):
    """An ε in normalised units would be a step of ε · std pixels: another attack."""
    mean, std = 0.3, 0.25
    whole = digits.train.fetch(digits.train.ids)
    other = Classification(Normalised(digits.model, mean, std), ((whole.x - mean) / std, whole.y))
    same = Request(ids=tuple(digits.train.positions(THREES.resolve(digits.train)).tolist()))
    labels = []
    for problem, request, given in (
        (digits, THREES, {}),
        (other, same, {"mean": (mean,), "std": (std,)}),
    ):
        method = BoundaryShrink(epsilon=0.1, **given)
        labels.append(method.nearest(view_of(problem, method, request), Runtime(seed=0))[1])
    assert torch.equal(*labels)
    with pytest.raises(DataError, match=r"not pixels.*mean= and std="):
        run(other, BoundaryShrink(), same)
    inputs = BoundaryShrink(epsilon=0.1, space="inputs")
    there = inputs.nearest(view_of(other, inputs, same), Runtime(seed=0))[1]
    assert not torch.equal(there, labels[0])


def test_boundary_shrink_climbs_the_loss_in_the_space_of_inputs_too():
    """Down the loss no attack would ever succeed."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    y = net(x).argmax(1)  # all right to begin with
    problem, request = Classification(net, (x, y)), Request(ids=tuple(range(20)))
    method = BoundaryShrink(epsilon=0.3, space="inputs")
    _, labels = method.nearest(view_of(problem, method, request), Runtime(seed=0))
    free = x[:20].clone().requires_grad_()
    (slope,) = torch.autograd.grad(nn.functional.cross_entropy(net(free), y[:20]), free)
    assert torch.equal(labels, net(x[:20] + 0.3 * slope.sign()).argmax(1))
    assert 3 < int((labels != y[:20]).sum()) < 20


def test_boundary_shrink_normalises_by_channel():
    torch.manual_seed(0)
    x = torch.rand(20, 3, 4, 4)
    mean, std = (0.1, 0.5, 0.9), (1.0, 0.5, 0.25)
    m, s = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (mean, std))
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    problem = Classification(net, ((x - m) / s, torch.arange(20) % 4))
    method = BoundaryShrink(mean=mean, std=std, levels=0, epsilon=0.05)
    view = view_of(problem, method)
    batch = next(view.forget.batches(20))
    attacked = method.attacked(view, view.original(), batch).x
    step = ((attacked - batch.x) * s).abs()
    assert float(step.max()) == pytest.approx(0.05, abs=1e-5)
    two = BoundaryShrink(mean=mean[:2], std=std[:2])
    with pytest.raises(DataError, match="channels"):
        run(problem, two)
    with pytest.raises(SettingError, match="mean and std"):
        BoundaryShrink(mean=mean, std=std[:2])


def test_boundary_shrink_finds_its_labels_once(digits):
    gradients = run(digits, BoundaryShrink(epochs=5, lr=1e-3)).cost.gradients
    assert gradients == 6 * len(THREES.resolve(digits.train))


def test_boundary_shrink_reads_no_retain_data_and_takes_one_sample(digits):
    assert not BoundaryShrink().needs.retain
    one = Request(ids=(int(digits.train.ids[0]),))
    assert run(digits, BoundaryShrink(epochs=1, lr=1e-3), one).record["forgotten"] == 1


# ------------------------------------------------------------------ expand


def test_baselines_vision_invariant_6_expand_leaves_as_many_classes_as_before(digits):
    outcome = run(digits, BoundaryExpand(epochs=2, lr=1e-3))
    before, after = digits.model.state_dict(), outcome.model.state_dict()
    assert {n: v.shape for n, v in after.items()} == {n: v.shape for n, v in before.items()}
    assert outcome.model[-1].out_features == 10
    with torch.no_grad():
        logits = outcome.model(digits.test.fetch(digits.test.ids[:5]).x)
    assert logits.shape == (5, 10)


@pytest.mark.parametrize("bias", [True, False])
def test_expand_copies_the_rows_and_removes_only_the_shadow(bias):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4, bias=bias))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    x = torch.rand(3, 6)
    with torch.no_grad():
        logits = model(x)
        assert widen(model, "2", 4, torch.Generator().manual_seed(0)) == 4
        wide = model(x)
    assert wide.shape == (3, 5) and torch.equal(wide[:, :4], logits)
    assert float(model[2].weight[4].detach().abs().max()) <= 5**-0.5
    assert float(model[2].weight[4].detach().abs().max()) > 0
    narrow(model, "2")
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_expand_trains_the_forget_samples_into_the_shadow_class(digits, monkeypatch):
    seen = []
    true = Classification.each_loss

    def spy(self, model, batch):
        seen.append((set(batch.y.tolist()), set(batch.ids.tolist())))
        return true(self, model, batch)

    monkeypatch.setattr(Classification, "check", lambda self: None)
    monkeypatch.setattr(Classification, "each_loss", spy)
    outcome = run(digits, BoundaryExpand(epochs=20, lr=3e-3))
    assert all(labels == {10} for labels, _ in seen)
    assert set().union(*(ids for _, ids in seen)) == set(THREES.resolve(digits.train).tolist())
    losses = [p["loss"] for p in outcome.curve]
    assert losses[-1] < 1 < 10 < losses[0]


def test_boundary_expand_reads_no_labels(digits):
    bare = copy.copy(digits)
    whole = digits.train.fetch(digits.train.ids)
    bare.train = type(digits.train)((whole.x, None), ids=digits.train.ids)
    bare._hashes = {}
    request = Request(ids=tuple(THREES.resolve(digits.train).tolist()))
    method = BoundaryExpand(epochs=2, lr=1e-3)
    assert method.needs.labels == "none" and not method.needs.retain
    assert run(bare, method, request).record["weights"] == run(digits, method).record["weights"]


def test_expand_wants_a_linear_layer_with_an_output_a_class(digits):
    wrong = Classification(digits.model, digits.train, roles={"last layer": ["0"]})
    with pytest.raises(NeedsError, match="last layer"):
        run(wrong, BoundaryExpand())


def test_expand_says_that_it_cannot_widen_a_computed_weight(digits):
    from torch.nn.utils.parametrizations import weight_norm

    model = copy.deepcopy(digits.model)
    weight_norm(model[4])
    with pytest.raises(NeedsError, match="computes its weight"):
        run(Classification(model, digits.train), BoundaryExpand())


def test_expand_keeps_a_pruned_model_pruned(digits):
    kept = {"4.weight": torch.ones(10, 64, dtype=torch.bool)}
    kept["4.weight"][:, ::2] = False
    model = keep_only(copy.deepcopy(digits.model), kept)
    problem = digits.pruned(model, kept, recipe=None, name="pruned", source={})
    after = run(problem, BoundaryExpand(epochs=2, lr=1e-2)).model
    assert not after[4].weight[:, ::2].any()
    assert kept_of(after)["4.weight"].shape == (10, 64)
