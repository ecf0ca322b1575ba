"""LAF: the invariants of the card laf, on the digits and on plain tensors."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.core.data import Data
from expunge.core.errors import AccessError, ExpungeError, NeedsError, SettingError, UnchangedError
from expunge.core.hashing import hash_model
from expunge.core.method import unlearn
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.methods.general.laf import LAF, alignment_loss, bounded, extractor_loss
from expunge.problems.classification import Classification
from expunge.train.features import original_features
from expunge.train.stages import Stages
from expunge.train.vae import VAE, kl, vae_loss
from expunge.workloads.nets import digits_mlp

QUICK = {"epochs": 2, "vae_epochs": 1, "lr": 1e-3, "lr_alignment": 1e-3}


def run(problem, method, request=None, **runtime):
    request = request or Request(label=(3,))
    return unlearn(problem, request, method, runtime=Runtime(seed=0, threads=1, **runtime))


def view_of(problem, method, seed=0):
    return View(problem, Request(label=(3,)), method.needs, Runtime(seed=seed))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state(outcome):
    return outcome.runnable().state_dict()


# ------------------------------------------------------------------ the card's invariants


def test_laf_invariant_1_no_label_is_read(digits):
    """Permuted labels and none at all give the same bits; the View has none to give."""
    request = Request(ids=tuple(Request(label=(3,)).resolve(digits.train).tolist()))
    batch = digits.train.fetch(digits.train.ids)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(1))
    weights = []
    for y in (batch.y, batch.y[order], None):
        problem = Classification(digits.model, Data((batch.x, y), ids=digits.train.ids))
        weights.append(run(problem, LAF(**QUICK), request).record["weights"])
    assert len(set(weights)) == 1
    method = LAF(**QUICK)
    assert method.needs.labels == "none"
    view = view_of(digits, method)
    for source in (view.forget, view.retain, view.everything):
        assert next(source.batches(4)).y is None
        with pytest.raises(AccessError):
            source.labels()


def test_laf_reads_labels_only_for_the_repair_or_a_saliency_mask(digits):
    assert LAF(repair=0.1).needs.labels == "retain"
    assert LAF(train="saliency(0.5)").needs.labels == "forget"
    assert LAF(train="saliency(0.5)", repair=0.1).needs.labels == "all"
    view = view_of(digits, LAF(repair=0.1))
    assert next(view.forget.batches(4)).y is None and next(view.retain.batches(4)).y is not None


def test_laf_invariant_2_bounded_error():
    m = torch.tensor([0.0, 0.3, 1.0, 7.0, 200.0, 1e6], dtype=torch.float64, requires_grad=True)
    values = bounded(m)
    (slopes,) = torch.autograd.grad(values.sum(), m)
    values, m = values.detach(), m.detach()
    assert float(values[0]) == 1.0
    assert bool((values.diff() > 0).all()) and float(values.max()) < math.e
    assert slopes.allclose(values / (m + 1) ** 2)
    assert values.allclose((m / (m + 1)).exp())
    assert float(bounded(torch.tensor(math.inf))) == pytest.approx(math.e)


def test_laf_invariant_3_alignment_at_the_start(digits):
    """At the original the loss is −|B_r| log |B_f| for every τ, and pulling has no gradient."""
    for temperature in (0.5, 5.0, 20.0):
        at_zero = alignment_loss(torch.zeros(7), torch.zeros(5), temperature)
        assert float(at_zero) == pytest.approx(-7 * math.log(5))
    view, model = view_of(digits, LAF()), copy.deepcopy(digits.model)
    known = original_features(view)
    batch = next(view.retain.batches(16))
    e = view.penultimate(model, batch)
    kept = 1 - torch.nn.functional.cosine_similarity(e, known.of(batch.ids))
    assert float(kept.detach().abs().max()) < 1e-6
    weights = [p for n, p in model.named_parameters() if not n.startswith("4")]
    for g in torch.autograd.grad(kept.sum(), weights):
        assert float(g.abs().max()) < 1e-5
    curve = run(digits, LAF(**QUICK)).curve
    first = next(p for p in curve if p["stage"] == "laf" and p["lr"] == 1e-3 and p["loss"] < -50)
    assert first["loss"] == pytest.approx(-32 * math.log(32), abs=0.5)


def test_laf_invariant_4_gradients_of_the_alignment():
    kept, gone = draw(6).abs().requires_grad_(), draw(9, seed=1).abs().requires_grad_()
    for temperature in (0.7, 20.0):
        by_kept, by_gone = torch.autograd.grad(
            alignment_loss(kept, gone, temperature), [kept, gone]
        )
        assert by_kept.equal(torch.ones(6).double())
        assert by_gone.allclose(-6 * (gone / temperature).softmax(0) / temperature)
    (far,) = torch.autograd.grad(alignment_loss(kept, gone, 1e9), gone)
    assert float(far.abs().max()) < 1e-8


def test_laf_invariant_5_models_of_features_stay_and_divergence_is_exact(digits, monkeypatch):
    """Neither VAE, nor the teacher's features, nor the problem's model move in the loop."""
    vaes, trained = [], []
    plain = LAF._vae

    def kept(self, *args):
        vaes.append(plain(self, *args))
        trained.append(hash_model(vaes[-1]))
        return vaes[-1]

    monkeypatch.setattr(LAF, "_vae", kept)
    before = hash_model(digits.model)
    run(digits, LAF(**QUICK))
    assert len(vaes) == 2 and trained[0] != trained[1]
    assert [hash_model(v) for v in vaes] == trained
    assert not any(p.requires_grad or p.grad is not None for v in vaes for p in v.parameters())
    assert hash_model(digits.model) == before
    zero = torch.zeros(4, 3, dtype=torch.float64)
    assert float(kl(zero, zero)) == pytest.approx(0.0, abs=1e-7)
    assert float(kl(zero + 2, zero)) == pytest.approx(3 * 2.0)  # ½ μ² a dimension
    assert float(kl(zero, zero + math.log(4))) == pytest.approx(3 * (4 - 1 - math.log(4)) / 2)


def test_laf_invariant_6_rates_of_zero_change_nothing(digits):
    method = LAF(**QUICK | {"lr": 0.0, "lr_alignment": 0.0})
    outcome = method.run(view_of(digits, method), Runtime(seed=0, threads=1))
    assert hash_model(outcome.runnable()) == hash_model(digits.model)
    with pytest.raises(UnchangedError):
        run(digits, method)


def test_laf_invariant_6_repair_touches_the_head_only(digits):
    plain, repaired = (run(digits, LAF(**QUICK, repair=r)) for r in (0.0, 0.1))
    head = digits.role("last layer")[0] + "."
    for name, value in state(plain).items():
        # without the repair no gradient reaches the head
        assert name.startswith(head) or torch.equal(value, state(repaired)[name])
        if name.startswith(head):
            assert torch.equal(value, digits.model.state_dict()[name])
            assert not torch.equal(value, state(repaired)[name])
    batches = math.ceil(round(0.1 * (1200 - plain.record["forgotten"])) / 32)
    assert repaired.details["steps"] - plain.details["steps"] == batches


def test_laf_invariant_7_equal_sides_cancel():
    torch.manual_seed(0)
    vae = VAE(6, 2).double()
    e, noise = draw(8, 6).requires_grad_(), draw(8, 2, seed=1)
    loss = extractor_loss(vae.errors(e, noise), vae.errors(e, noise))
    (g,) = torch.autograd.grad(loss, e)
    assert float(loss.detach()) == 0.0 and float(g.abs().max()) < 1e-12
    loss = extractor_loss(vae.errors(e, noise), vae.errors(e[:3], noise[:3]))
    assert float(loss.detach()) > 0  # sums, not means


# ------------------------------------------------------------------ VAEs and the loop


def test_laf_error_reaches_input_and_target():
    torch.manual_seed(0)
    vae = VAE(6, 2).double().requires_grad_(False)
    e, noise = draw(3, 6).requires_grad_(), draw(3, 2, seed=1)
    (whole,) = torch.autograd.grad(vae.errors(e, noise).sum(), e)
    other = e.detach().clone().requires_grad_()
    by_target = torch.autograd.grad((vae(e.detach(), noise)[0] - other).square().sum(), other)[0]
    by_input = torch.autograd.grad((vae(other, noise)[0] - e.detach()).square().sum(), other)[0]
    assert whole.allclose(by_target + by_input) and float(by_input.abs().max()) > 0


def test_laf_vae_loss_by_hand():
    torch.manual_seed(0)
    vae = VAE(6, 2).double()
    e, noise = draw(5, 6), draw(5, 2, seed=1)
    found, mean, log_variance = (t.detach() for t in vae(e, noise))
    assert float(found.min()) > 0 and float(found.max()) < 1
    by_hand = ((found - e) ** 2).sum() / 5
    spread = log_variance.exp()
    by_hand = by_hand - 0.025 * (spread.log() + 1 - mean**2 - spread).sum() / 2 / 5
    assert float(vae_loss(vae, e, noise, 0.025).detach()) == pytest.approx(float(by_hand), rel=1e-6)
    assert float(VAE(6, 2, "linear").double()(10 * e, noise)[0].detach().min()) < 0


def test_laf_linear_decoder_fits_unbounded_features_better(digits):
    view, runtime = view_of(digits, LAF()), Runtime(seed=0, threads=1)
    known, errors = original_features(view), {}
    for decoder in ("sigmoid", "linear"):
        method = LAF(decoder=decoder, vae_epochs=20)
        stages = Stages(method, view.model(), view, runtime)
        vae = method._vae(stages, "vae", known, view.everything.ids, runtime)
        noise = torch.zeros(len(known.values), method.latent)
        errors[decoder] = float(vae.errors(known.values, noise).mean())
    assert errors["linear"] < 0.8 * errors["sigmoid"]


def test_laf_turns_are_the_loop_of_its_paper(monkeypatch):
    """Both steps of every pair against a loop written out, with the VAEs the method trained."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=generator)
    y = torch.randint(3, (40,), generator=generator)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    vaes = []
    plain = LAF._vae

    def kept(self, *args):
        vaes.append(plain(self, *args))
        return vaes[-1]

    monkeypatch.setattr(LAF, "_vae", kept)
    method = LAF(
        epochs=2, batch_size=16, lr=1e-2, lr_alignment=2e-2, temperature=5.0, vae_epochs=20
    )
    outcome = run(Classification(net, (x, y)), method, Request(ids=tuple(range(12))))
    h, q = vaes

    model, runtime = copy.deepcopy(net), Runtime(seed=0)
    away, back = (torch.optim.Adam(model.parameters(), lr=lr) for lr in (1e-2, 2e-2))

    def phi(vae, e, side, epoch):
        draws = torch.randn(len(e), 8, generator=runtime.generator("noise", side, epoch, 0))
        m = (vae(e, draws)[0] - e).square().sum(1)
        return (m / (m + 1)).exp().sum()

    def step(optimizer, loss):
        model.zero_grad()
        loss.backward()
        optimizer.step()

    for epoch in range(2):
        order = torch.randperm(28, generator=runtime.generator("retain", epoch))[:16] + 12
        gone = torch.randperm(12, generator=runtime.generator("forget", epoch))
        kept_features, gone_features = model[:2](x[order]), model[:2](x[gone])
        step(away, phi(h, kept_features, "retain", epoch) - phi(q, gone_features, "forget", epoch))
        near, far = (
            1 - torch.nn.functional.cosine_similarity(model[:2](x[i]), net[:2](x[i]).detach())
            for i in (order, gone)
        )
        step(back, near.sum() - len(near) * (far / 5).exp().sum().log())
    for got, wanted in zip(outcome.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_laf_first_vae_learns_what_it_is_told(digits, monkeypatch):
    asked = []
    plain = LAF._vae

    def noted(self, stages, name, known, ids, runtime):
        asked.append(set(ids.tolist()))
        return plain(self, stages, name, known, ids, runtime)

    monkeypatch.setattr(LAF, "_vae", noted)
    everything = set(digits.train.ids.tolist())
    forget = set(Request(label=(3,)).resolve(digits.train).tolist())
    for kind, first in (("all", everything), ("retain", everything - forget)):
        asked.clear()
        run(digits, LAF(**QUICK, remain_vae=kind))
        assert asked == [first, forget]


def test_laf_an_epoch_is_the_shorter_side(digits):
    """Two steps a pair; with a large forget set the retain side ends the epoch."""
    count = len(Request(label=(3,)).resolve(digits.train))
    few = run(digits, LAF(**QUICK)).details
    assert few["unlearning_steps"] == 2 * 2 * math.ceil(count / 32)
    many = run(digits, LAF(**QUICK), Request(label=tuple(range(9)))).details
    rest = 1200 - len(Request(label=tuple(range(9))).resolve(digits.train))
    assert many["unlearning_steps"] == 2 * 2 * math.ceil(rest / 32)
    assert many["vae_steps"] == math.ceil(1200 / 32) + math.ceil((1200 - rest) / 32)


def test_laf_leaves_running_statistics_and_dropout_out(digits):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 16), nn.Linear(16, 10)
    )
    problem = Classification(net, digits.train)
    frozen, moved = (run(problem, LAF(**QUICK, norm=n)) for n in ("frozen", "train"))
    for key in ("1.running_mean", "1.running_var"):
        assert torch.equal(state(frozen)[key], problem.model.state_dict()[key])
        assert not torch.equal(state(moved)[key], problem.model.state_dict()[key])
    losses = [p["loss"] for p in frozen.curve if p["stage"] == "laf"]
    assert min(losses) == pytest.approx(-32 * math.log(32), abs=0.5)  # dropout would show here


def test_laf_freezes_what_it_is_told(digits):
    outcome = run(digits, LAF(**QUICK, train="last(2)", weight_decay=0.1))
    for name, value in state(outcome).items():
        if name.startswith("0."):
            assert torch.equal(value, digits.model.state_dict()[name])
    with pytest.raises(SettingError, match="before the last layer"):
        run(digits, LAF(**QUICK, train="last(1)"))


def test_laf_says_at_once_when_the_repair_could_move_nothing(digits):
    body = Classification(digits.model, digits.train, roles={"body": ["0", "2"]})
    method = LAF(**QUICK, repair=0.1, train="role(body)")
    view, runtime = View(body, Request(label=(3,)), method.needs, Runtime(seed=0)), Runtime(seed=0)
    with pytest.raises(SettingError, match=r"repair=0.1 trains the last layer.*role\(body\)"):
        method.run(view, runtime)
    assert runtime.cost.gradients == 0
    run(body, LAF(**QUICK, train="role(body)"))


@pytest.mark.parametrize("after", [1, 2, 3], ids=["first vae", "second vae", "turns"])
def test_laf_resumes_in_every_stage(digits, tmp_path: Path, after):
    class Stop(xp.Runtime().reporter.__class__):
        left = 0

        def finish(self, task):
            self.left += 1
            if self.left == after:
                raise KeyboardInterrupt

    method = LAF(**QUICK, repair=0.1)
    whole = run(digits, method)
    options = {"checkpoint": tmp_path, "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        run(digits, method, reporter=Stop(), **options)
    again = run(digits, method, **options)
    assert again.record["weights"] == whole.record["weights"]
    assert again.cost.gradients == whole.cost.gradients


def test_laf_runs_in_one_process(digits, monkeypatch):
    view = view_of(digits, LAF())
    monkeypatch.setattr(Runtime, "processes", 2)
    with pytest.raises(NeedsError, match="one process"):
        LAF().run(view, Runtime())


def test_laf_says_when_features_are_not_finite():
    train = Data((torch.full((20, 64), 3e38), torch.arange(20) % 10))
    view = View(Classification(digits_mlp(), train), Request(ids=(1, 2)), LAF().needs, Runtime())
    with pytest.raises(ExpungeError, match="features"):
        LAF().run(view, Runtime())


def test_laf_forgets_a_digit_and_keeps_the_rest(digits):
    sevens = Request(label=(7,))
    outcome = run(digits, LAF.create(digits.tuned["laf"]), sevens)
    split, scores = digits.split(sevens), {}
    for name in ("forget-test", "retain-test"):
        batch = digits.test.fetch(split[name])
        with torch.no_grad():
            right = digits.logits(outcome.runnable(), batch).argmax(1) == batch.y
        scores[name] = float(right.float().mean())
    assert scores["forget-test"] < 0.1 and scores["retain-test"] > 0.93
