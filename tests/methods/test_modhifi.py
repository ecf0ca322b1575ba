"""ModHiFi: the card's invariants of subset fidelity, pruning with compensation, and ModHiFi-U."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.core.data import Batch
from expunge.core.errors import AccessError, ExpungeError, ModelError, NeedsError, SettingError
from expunge.core.view import View
from expunge.curvature.fidelity import Contributions, contributions, keep_inputs
from expunge.methods.general.modhifi_u import ModHiFiU
from expunge.suite.checks import bench_problem
from expunge.train.hifi_prune import prune_inputs

REQUEST = xp.forget(label=3)


def batch_of(x):
    return Batch(x, None, torch.arange(len(x)), len(x))


def measured(layer, x):
    return contributions(nn.Sequential(layer), "0", [batch_of(x)], lambda b: layer(b.x))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def linear():
    torch.manual_seed(1)
    return measured(nn.Linear(6, 4), draw(50, 6) + 0.5)


@pytest.fixture
def conv():
    torch.manual_seed(2)
    layer = nn.Conv2d(5, 3, 3, stride=2, padding=1, dilation=1)
    return layer, measured(layer, draw(20, 5, 7, 7))


def test_modhifi_invariant_1_bounds_and_closed_form(linear, conv):
    for found in (linear, conv[1]):
        s = found.singleton()
        assert float(s.min()) >= 0 and float(s.max()) <= 1
        inputs = s.shape[1]
        for c in range(len(s)):
            whole, scales = found.fidelity(c, torch.arange(inputs))
            assert whole == pytest.approx(1.0, abs=1e-8)
            assert scales.allclose(torch.ones(inputs).double(), atol=1e-6)
            for i in range(inputs):
                alone, _ = found.fidelity(c, torch.tensor([i]))
                assert alone == pytest.approx(float(s[c, i]), abs=1e-5)
            grown = [found.fidelity(c, torch.arange(k))[0] for k in range(1, inputs + 1)]
            assert grown == sorted(grown)


def test_modhifi_invariant_2_orthogonal_contributions_add_up():
    x = torch.eye(8).repeat_interleave(torch.arange(1, 9), 0)  # one input at a time: G is diagonal
    torch.manual_seed(3)
    found = measured(nn.Linear(8, 2, bias=False), x)
    s = found.singleton()[0]
    for k in (1, 3, 5):
        best = max(
            itertools.combinations(range(8), k),
            key=lambda c: found.fidelity(0, torch.tensor(c))[0],
        )
        greedy = s.argsort(descending=True)[:k]
        assert set(best) == set(greedy.tolist())
        assert found.fidelity(0, greedy)[0] == pytest.approx(float(s[greedy].sum()), abs=1e-9)


def test_modhifi_invariant_3_scales_twins_and_order(linear):
    layer, x = nn.Linear(6, 4), draw(50, 6) + 0.5
    s = measured(layer, x).singleton()
    with torch.no_grad():
        layer.weight[1] *= -3.0
    assert measured(layer, x).singleton().allclose(s)
    scaled = x.clone()
    scaled[:, 2] *= 4
    with torch.no_grad():
        layer.weight[:, 2] /= 4
    assert measured(layer, scaled).singleton().allclose(s, atol=1e-6)
    with torch.no_grad():
        layer.weight[:, 5] = layer.weight[:, 4]
    twins = x.clone()
    twins[:, 5] = x[:, 4]
    s = measured(layer, twins).singleton()
    assert s[:, 4].allclose(s[:, 5])
    order = torch.tensor([3, 1, 0, 5, 2, 4])
    permuted = nn.Linear(6, 4)
    permuted.weight.data = layer.weight.data[:, order]
    assert measured(permuted, twins[:, order]).singleton().allclose(s[:, order], atol=1e-7)


def test_modhifi_invariant_4_two_halves_equal_one_pass(conv):
    layer, whole = conv
    x = draw(20, 5, 7, 7)
    halves = measured(layer, x[:7]).joined(measured(layer, x[7:]))
    assert halves.samples == whole.samples
    assert halves.moment.allclose(whole.moment, rtol=1e-6)
    streamed = contributions(
        nn.Sequential(layer), "0", [batch_of(x[:7]), batch_of(x[7:])], lambda b: layer(b.x)
    )
    assert streamed.moment.allclose(whole.moment, rtol=1e-6)


def test_modhifi_invariant_5_compensation_never_adds_error(conv):
    layer, found = conv
    x, kept = draw(20, 5, 7, 7), torch.tensor([0, 3])
    with torch.no_grad():
        y = layer(x)
        errors = []
        for compensate in (False, True):
            pruned = nn.Conv2d(5, 3, 3, stride=2, padding=1)
            pruned.load_state_dict(layer.state_dict())
            keep_inputs(pruned, found, kept, compensate)
            assert pruned.weight[:, [1, 2, 4]].eq(0).all()
            errors.append((pruned(x) - y).square().sum((0, 2, 3)))
    assert bool((errors[1] <= errors[0] * (1 + 1e-6)).all())
    # and the error is what the fidelity says
    energy = torch.stack([found.gram(c).sum() for c in range(3)])
    lost = torch.tensor([1 - found.fidelity(c, kept)[0] for c in range(3)]).double()
    assert errors[1].double().allclose(lost * energy, rtol=1e-3)


def test_modhifi_invariant_7_linear_and_convolution_equal_explicit_contributions(linear, conv):
    x = draw(50, 6) + 0.5
    for c in range(4):
        a = x.double() * linear.weight[c, :, 0].double()
        assert linear.gram(c).allclose(a.T @ a, rtol=1e-5)
    layer, found = conv
    images = draw(20, 5, 7, 7)
    for c in range(3):
        parts = []
        for i in range(5):
            one = nn.Conv2d(1, 1, 3, stride=2, padding=1, bias=False)
            one.weight.data = layer.weight.data[c : c + 1, i : i + 1]
            parts.append(one(images[:, i : i + 1]).flatten().detach().double())
        a = torch.stack(parts)
        assert found.gram(c).allclose(a @ a.T, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("kernel", "dilation", "padding"),
    [(3, 1, "same"), ((2, 5), 1, "same"), ((4, 3), (1, 2), "same"), (3, 1, "valid")],
)
def test_modhifi_convolutions_with_padding_by_name(kernel, dilation, padding):
    torch.manual_seed(4)
    layer = nn.Conv2d(2, 3, kernel, dilation=dilation, padding=padding, bias=False)
    x = draw(4, 2, 7, 8)
    with torch.no_grad():
        y = layer(x)
    found = measured(layer, x)
    assert found.samples == y[:, 0].numel()
    assert found.products()[2].allclose(y.double().square().sum((0, 2, 3)), rtol=1e-4)


def test_modhifi_tokens_are_samples():
    layer, x = nn.Linear(4, 3), draw(5, 7, 4)
    tokens = measured(layer, x)
    assert tokens.samples == 35
    assert tokens.moment.allclose(measured(layer, x.reshape(35, 4)).moment)


def test_modhifi_channel_scores_by_hand(linear):
    s, (_, _, energy) = linear.singleton(), linear.products()
    by_hand = (s * energy[:, None]).sum(0) / energy.sum()
    assert linear.channels("energy").allclose(by_hand)
    assert linear.channels("mean").allclose(s.mean(0))
    assert linear.channels("max").allclose(s.amax(0))


def test_modhifi_dead_outputs_drop_out():
    weight = torch.ones(2, 3, 1)
    weight[1] = 0
    found = Contributions(weight, torch.eye(3).double(), 3)
    assert bool(found.singleton()[1].eq(0).all())
    assert found.channels("mean").allclose(torch.full((3,), 1 / 3).double())
    assert found.fidelity(1, torch.tensor([0]))[0] == 1.0


def test_modhifi_other_layers_are_refused():
    with pytest.raises(NeedsError, match="BatchNorm2d"):
        measured(nn.BatchNorm2d(3), draw(2, 3, 4, 4))
    with pytest.raises(NeedsError, match="Conv2d with 2 groups"):
        measured(nn.Conv2d(4, 4, 3, groups=2), draw(2, 4, 5, 5))
    with pytest.raises(NeedsError, match="Conv2d with reflect padding"):
        measured(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), draw(2, 4, 5, 5))
    with pytest.raises(ModelError, match="nowhere"):
        contributions(nn.Sequential(), "nowhere", [], lambda b: None)


def test_modhifi_scales_nearest_to_one_where_there_is_a_choice():
    """Dead inputs keep their weights, twins share, a dead output loses nothing."""
    x = draw(40, 4) + 0.5
    x[:, 3] = 0
    x[:, 1] = x[:, 0]
    torch.manual_seed(0)
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight[:, 1] = layer.weight[:, 0]
    found = measured(layer, x)
    whole, scales = found.fidelity(0, torch.arange(4))
    assert whole == pytest.approx(1.0) and scales.allclose(torch.ones(4).double())
    _, scales = found.fidelity(0, torch.tensor([0, 2, 3]))
    assert float(scales[0]) == pytest.approx(2.0) and float(scales[2]) == 1.0


def test_modhifi_scores_do_not_compare_rows_of_other_sizes():
    layer, x = nn.Linear(6, 4), draw(50, 6) + 0.5
    s = measured(layer, x).singleton()
    with torch.no_grad():
        layer.weight[1] *= 1e-8
    assert measured(layer, x).singleton().allclose(s, atol=1e-6)


def test_modhifi_contributions_hold_the_weight_of_their_time():
    layer, x = nn.Linear(6, 4), draw(50, 6)
    found = measured(layer, x)
    before = found.weight.clone()
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(found.weight, before)


def test_modhifi_refuses_what_is_not_finite():
    x = draw(5, 6)
    x[2, 1] = float("inf")
    with pytest.raises(ExpungeError, match="NaN or infinite"):
        measured(nn.Linear(6, 4), x)


def test_modhifi_p_keeps_the_best_inputs_and_helps():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    batch, errors = batch_of(draw(200, 8) + 0.5), {}
    for compensate in (False, True):
        pruned = copy.deepcopy(net)
        kept = prune_inputs(
            pruned, ["2", "4"], lambda: [batch], lambda b, m=pruned: m(b.x), keep=0.5,
            compensate=compensate,
        )  # fmt: skip
        assert {n: len(k) for n, k in kept.items()} == {"2": 8, "4": 8}
        scores = contributions(net, "2", [batch], lambda b: net(b.x)).channels()
        assert set(kept["2"].tolist()) == set(scores.topk(8).indices.tolist())
        for name, places in kept.items():
            columns = pruned.get_submodule(name).weight.ne(0).any(0)
            assert torch.equal(columns.nonzero()[:, 0], places)
        with torch.no_grad():
            errors[compensate] = float((pruned(batch.x) - net(batch.x)).square().mean())
    assert errors[True] < 0.5 * errors[False]
    for share in (0.0, 1.1):
        with pytest.raises(SettingError, match="keep"):
            prune_inputs(net, ["2"], lambda: [batch], lambda b: net(b.x), keep=share)


def test_modhifi_p_keeping_all_changes_nothing():
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    pruned, batch = copy.deepcopy(net), batch_of(draw(50, 8))
    prune_inputs(pruned, ["0", "2"], lambda: [batch], lambda b: pruned(b.x), keep=1.0)
    for name, value in net.state_dict().items():
        assert value.allclose(pruned.state_dict()[name], atol=1e-5)


def test_modhifi_tokens_of_a_vit_are_samples():
    """The second feed-forward matrix of a ViT: every token counts, and pruning runs through it."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    vit = ViTForImageClassification(
        ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                  image_size=8, patch_size=4, num_channels=1, num_labels=4)
    ).eval()  # fmt: skip
    (layer,) = [
        n for n, m in vit.named_modules()
        if isinstance(m, nn.Linear) and (m.in_features, m.out_features) == (24, 16) and ".0." in n
    ]  # fmt: skip
    x, read = draw(6, 1, 8, 8), []
    handle = vit.get_submodule(layer).register_forward_pre_hook(lambda _m, a: read.append(a[0]))
    with torch.no_grad():
        found = contributions(vit, layer, [batch_of(x)], lambda b: vit(b.x))
        handle.remove()
        tokens = read[0].reshape(-1, 24).double()
    assert found.samples == len(tokens) == 6 * 5  # four patches and the class token
    assert found.moment.allclose(tokens.T @ tokens)
    for c in (0, 7):
        a = tokens * vit.get_submodule(layer).weight[c].detach().double()
        assert found.gram(c).allclose(a.T @ a)
    kept = prune_inputs(vit, [layer], lambda: [batch_of(x)], lambda b: vit(b.x), keep=0.5)
    assert len(kept[layer]) == 12


# ---------------------------------------------------------------- ModHiFi-U


def test_modhifi_invariant_6_only_the_budget_changes_and_nothing_is_kept_back():
    problem = bench_problem()
    method = ModHiFiU(budget=0.25)
    outcome = xp.unlearn(problem, REQUEST, method)
    original, edited = problem.model.state_dict(), outcome.runnable().state_dict()
    last = problem.role("last layer")[0] + ".weight"
    for name, value in edited.items():
        if name != last:
            assert torch.equal(value, original[name])
    columns = edited[last].eq(0).all(0)
    assert int(columns.sum()) == round(0.25 * edited[last].shape[1])
    assert torch.equal(edited[last][:, ~columns], original[last][:, ~columns])
    assert outcome.cost.gradients == 0
    assert outcome.cost.samples == outcome.record["forgotten"]


def test_modhifi_invariant_6_no_gradient_no_retain_data_no_labels(monkeypatch):
    problem, seen = bench_problem(), []
    monkeypatch.setattr(
        type(problem), "logits",
        lambda self, m, b: seen.append(torch.is_inference_mode_enabled()) or m(b.x),
    )  # fmt: skip
    monkeypatch.setattr(type(problem), "each_loss", lambda *_: pytest.fail("it used the loss"))
    method = ModHiFiU(budget=0.2)
    view = View(problem, REQUEST, method.needs, xp.Runtime())
    method.run(view, xp.Runtime())
    assert seen and all(seen)
    with pytest.raises(AccessError):
        _ = view.retain
    with pytest.raises(AccessError):
        view.forget.labels()


def test_modhifi_budget_grows_until_the_class_is_gone():
    outcome = xp.unlearn(bench_problem(), REQUEST, ModHiFiU())
    tried = outcome.details["tried"]
    shares, accuracies = zip(*tried, strict=True)
    assert list(shares) == sorted(shares) and accuracies[-1] <= 0.01 < min(accuracies[:-1])
    exact = xp.unlearn(bench_problem(), REQUEST, ModHiFiU(budget=shares[-1]))
    assert exact.record["weights"] == outcome.record["weights"]


def test_modhifi_contrast_reads_the_retain_data():
    plain = xp.unlearn(bench_problem(), REQUEST, ModHiFiU(budget=0.1))
    contrast = xp.unlearn(bench_problem(), REQUEST, ModHiFiU(budget=0.1, contrast=True))
    assert contrast.cost.samples > plain.cost.samples
    assert contrast.record["weights"] != plain.record["weights"]


def test_modhifi_layers_are_checked():
    with pytest.raises(SettingError, match="last"):
        ModHiFiU(layers="full")
    with pytest.raises(SettingError):
        ModHiFiU(layers="last(0)")


@pytest.mark.parametrize(("most", "budgets"), [(0.05, 1), (0.1, 2)])
def test_modhifi_says_when_auto_ends_before_the_class_is_gone(most, budgets):
    outcome = xp.unlearn(bench_problem(), REQUEST, ModHiFiU(most=most))
    assert len(outcome.details["tried"]) == budgets
    left = outcome.details["tried"][-1][1]
    assert left > 0.01
    assert f"{left:.0%} of the forget samples are still recognised" in outcome.details["stopped"]
    for enough in (ModHiFiU(), ModHiFiU(budget=0.05)):  # the target was reached, or none was set
        assert "stopped" not in xp.unlearn(bench_problem(), REQUEST, enough).details


def test_modhifi_tables_show_that_auto_ended_early():
    found = xp.compare(
        bench_problem(), REQUEST, [{"name": "modhifi-u", "most": 0.05}], references=0, audits=["accuracy"]
    )  # fmt: skip
    assert any("still recognised" in note for row in found.rows for note in row["notes"])


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Linear(6, 4), nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.inner.weight

    def forward(self, x):
        return self.head(torch.relu(self.inner(torch.relu(self.first(x)))))


def test_modhifi_does_not_edit_another_layer_by_a_shared_weight():
    problem = xp.Classification(Shared(), (draw(20, 6), torch.arange(20) % 4))
    for layers in ("last(1)", "last(2)"):
        with pytest.raises(SettingError, match=r"head and inner|inner and head"):
            xp.unlearn(problem, xp.forget(label=1), ModHiFiU(budget=0.5, layers=layers))
    batch, net = batch_of(draw(20, 6)), Shared()
    with pytest.raises(SettingError, match=r"head and inner|inner and head"):
        prune_inputs(net, ["head"], lambda: [batch], lambda b: net(b.x), keep=0.5)


def test_modhifi_layers_that_cannot_be_scored_are_said_before_any_work():
    x, y = draw(12, 4, 3, 3), torch.arange(12) % 4
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten())
    method = ModHiFiU(budget=0.5)
    with pytest.raises(NeedsError, match="2 groups"):
        method.check(xp.Classification(grouped, (x, y)), xp.forget(label=1))
    plain = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten())
    problem = xp.Classification(plain, (x, y), roles={"typo": ["7"]})
    with pytest.raises(SettingError, match="1 linear or convolution layer;"):
        ModHiFiU(budget=0.5, layers="last(2)").check(problem, xp.forget(label=1))
    with pytest.raises(ModelError, match="'7'"):
        ModHiFiU(budget=0.5, layers="role(typo)").check(problem, xp.forget(label=1))
