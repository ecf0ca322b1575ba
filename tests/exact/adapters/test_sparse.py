"""The invariants of the card sara, and its pitfalls, on networks that exist."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.nn.functional import cross_entropy

from expunge.core.errors import ModelError, SettingError
from expunge.core.hashing import hash_model
from expunge.exact import adapters as sl
from expunge.exact.adapters.sparse_training import (
    SparseAdamW,
    densities,
    nuclear_norm,
    paper_lr,
    reselect,
)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).eval()


def data(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(24, 1, 6, 6, generator=g), torch.randint(3, (24,), generator=g)


def attach(model, adapter, group="a", seed=0):
    adapter.attach(model, sl.fitting(model, adapter), group, seed)
    sl.train_only(model, group)
    return model


def own(model):
    """The base's parameters: name to tensor."""
    return {n: p for n, p in model.named_parameters() if "slice_maps" not in n}


def effective(model):
    return {n: p.detach() for n, p in sl.merged(model).named_parameters()}


def steps(model, optimizer, number=20, penalty=None, seed=0):
    x, y = data(seed)
    for _ in range(number):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        if penalty is not None:
            loss = loss + penalty()
        loss.backward()
        optimizer.step()


def indices(model, group="a"):
    """Chosen flat indices by parameter."""
    found = sl.maps_of(model, group).items()
    return {f"{m}.{n}": one.index(n).long() for m, one in found for n in one.names}


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors.values()])


def test_sara_invariant_1_large_weights_keep_every_bit():
    model = net()
    before = {n: p.detach().clone() for n, p in own(model).items()}
    attach(model, sl.SparseMagnitude(threshold=0.1))
    steps(model, SparseAdamW(model, "a", lr=0.01))
    after = effective(model)
    small = flat(before).abs() < 0.1
    assert torch.equal(flat(after)[~small], flat(before)[~small])
    assert (flat(after)[small] != flat(before)[small]).all() and small.sum() > 20
    assert all(torch.equal(p, before[n]) for n, p in own(model).items())


def test_sara_invariant_2_no_threshold_trains_nothing():
    model = net()
    before = hash_model(model)
    attach(model, sl.SparseMagnitude(threshold=0.0))
    assert sl.count(model, "a") == 0
    with pytest.raises(SettingError, match="no weight"):
        SparseAdamW(model, "a")
    assert hash_model(sl.merged(model)) == before


@pytest.mark.parametrize("adapter", [sl.SparseMagnitude(threshold=math.inf), sl.SparseMagnitude(1)])
def test_sara_invariant_2_all_weights_are_adamw(adapter):
    model, plain = net(), net()
    attach(model, adapter)
    assert sl.count(model, "a") == sum(p.numel() for p in plain.parameters())
    steps(model, SparseAdamW(model, "a", lr=0.01, weight_decay=0.3))
    steps(plain, torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.3))
    for name, value in effective(model).items():
        assert torch.allclose(value, dict(plain.named_parameters())[name], atol=1e-5), name
    other = attach(net(), adapter)
    steps(other, SparseAdamW(other, "a", lr=0.01, weight_decay=0.0))
    assert not torch.allclose(flat(effective(other)), flat(effective(model)), atol=1e-3)


def test_sara_invariant_3_the_first_output_is_the_bases():
    model, (x, _) = net(), data()
    before = model(x)
    attach(model, sl.SparseMagnitude(0.5))
    assert torch.equal(model(x), before)
    assert any((own(model)[n].flatten()[i] < 0).any() for n, i in indices(model).items())
    # the official code begins with |v|: here negative small weights are as they were
    assert (flat(effective(model)) == flat(own(model))).all()


def test_sara_invariant_4_gradients_are_the_dense_ones():
    model, (x, y) = net(), data()
    plain = copy.deepcopy(model)
    attach(model, sl.SparseMagnitude(0.4))
    cross_entropy(model(x), y).backward()
    cross_entropy(plain(x), y).backward()
    checked = 0
    for module, one in sl.maps_of(model, "a").items():
        for name in one.names:
            dense = own(plain)[f"{module}.{name}"].grad.flatten()
            assert torch.allclose(one.delta(name).grad, dense[one.index(name).long()], atol=1e-6)
            assert own(model)[f"{module}.{name}"].grad is None
            checked += len(one.index(name))
    assert checked == sl.count(model, "a") > 80


def test_sara_invariant_4_second_derivatives():
    value = torch.randn(5, dtype=torch.double)
    delta = torch.randn(2, dtype=torch.double, requires_grad=True)
    index = torch.tensor([3, 1], dtype=torch.int32)
    from expunge.exact.adapters.sparse import _add

    assert torch.autograd.gradcheck(lambda d: _add(value, d, index).pow(3), (delta,))
    assert torch.autograd.gradgradcheck(lambda d: _add(value, d, index).pow(3), (delta,))


def wide(seed=0, side=70):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(side, side))


def test_sara_invariant_5_gradient_of_the_nuclear_norm():
    model = attach(wide().double(), sl.SparseMagnitude(0.3, matrices=True))
    one = sl.maps_of(model, "a")["0"]
    index = one.index("weight").long()
    weight = own(model)["0.weight"].detach()
    mask = torch.zeros(70 * 70, dtype=torch.double)
    mask[index] = 1
    u, _, v = torch.linalg.svd(weight * mask.view(70, 70))
    wanted = (u @ v).flatten()[index]

    def norm():
        return nuclear_norm(model, "a", torch.Generator().manual_seed(0))

    norm().backward()
    found = one.delta("weight").grad.clone()
    assert torch.allclose(found, wanted.to(found), atol=1e-4)
    with torch.no_grad():
        for at in range(0, len(index), 300):
            sides = []
            for step in (1e-3, -1e-3):
                one.delta("weight")[at] += step
                sides.append(norm().item())
                one.delta("weight")[at] -= step
            assert (sides[0] - sides[1]) / 2e-3 == pytest.approx(found[at].item(), abs=1e-3)


def test_sara_invariant_5_the_stable_rank_falls():
    model = attach(wide(), sl.SparseMagnitude(0.5, matrices=True))
    one = sl.maps_of(model, "a")["0"]
    optimizer = SparseAdamW(model, "a", lr=1e-4, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)

    def stable_rank():
        part = torch.zeros(70 * 70)
        index = one.index("weight").long()
        part[index] = effective(model)["0.weight"].flatten()[index]
        part = part.view(70, 70)
        return (part.norm() ** 2 / torch.linalg.matrix_norm(part, 2) ** 2).item()

    ranks = [stable_rank()]
    x = torch.randn(8, 70)
    for _ in range(6):
        for _ in range(20):
            optimizer.zero_grad()
            (1e-6 * model(x).square().sum() + 100 * nuclear_norm(model, "a", generator)).backward()
            optimizer.step()
        ranks.append(stable_rank())
    assert all(later < earlier for earlier, later in itertools.pairwise(ranks)), ranks
    assert ranks[-1] < 0.9 * ranks[0]


def test_sara_invariant_5_only_matrices_wider_than_64():
    assert nuclear_norm(attach(wide(side=64), sl.SparseMagnitude(0.3)), "a", torch.Generator()) is None  # fmt: skip
    model = attach(nn.Sequential(wide()[0], wide(1)[0]), sl.SparseMagnitude(0.3))
    generator = torch.Generator().manual_seed(0)
    drawn = {round(nuclear_norm(model, "a", generator).item(), 3) for _ in range(20)}
    assert len(drawn) == 2


def test_sara_invariant_5_the_norm_acts_on_what_trains():
    made = []
    for weight in (0.0, 0.5):
        model = attach(wide(), sl.SparseMagnitude(0.3, matrices=True))
        optimizer = SparseAdamW(model, "a", lr=1e-3)
        loss = model(torch.ones(2, 70)).square().sum()
        (loss + weight * nuclear_norm(model, "a", torch.Generator())).backward()
        optimizer.step()
        made.append(flat(effective(model)))
    assert not torch.equal(*made)


def test_sara_invariant_6_progressive():
    model = attach(net(), sl.SparseMagnitude(0.5))
    x, _ = data()
    first = {n: set(i.tolist()) for n, i in indices(model).items()}
    threshold = sl.maps_of(model, "a")["0"].threshold
    number = sl.count(model, "a")
    steps(model, SparseAdamW(model, "a", lr=0.02), 10)
    learned, before = model(x).detach(), effective(model)
    left = reselect(model, "a")
    assert 0 < left == sl.count(model, "a") < number
    assert torch.allclose(model(x), learned, atol=1e-6)  # switching moves nothing
    phase = {n: set(i.tolist()) for n, i in indices(model).items()}
    assert all(phase[n] <= first[n] for n in first)
    optimizer = SparseAdamW(model, "a", lr=0.02)
    assert not optimizer.state
    steps(model, optimizer, 10)
    after, compared = effective(model), 0
    for name in first:
        was, now = before[name].flatten(), after[name].flatten()
        gone = torch.tensor(sorted(first[name] - phase[name]), dtype=torch.long)
        assert torch.equal(was[gone], now[gone]) and (was[gone].abs() >= threshold).all()
        compared += len(gone)
        kept = indices(model)[name]
        assert (was[kept].abs() < threshold).all() and (was[kept] != now[kept]).all()
    assert compared > 3
    # both phases are stored together
    other = net()
    sl.load(other, sl.SparseMagnitude(), sl.fitting(model, sl.SparseMagnitude()), "a", sl.state(model, "a"))  # fmt: skip
    assert torch.allclose(other(x), model(x), atol=1e-6)
    assert sl.count(other, "a") == number


def test_sara_invariant_7_storing_and_taking_off():
    model = net()
    x, _ = data()
    before = hash_model(model)
    attach(model, sl.SparseMagnitude(0.3))
    steps(model, SparseAdamW(model, "a", lr=0.01))
    stored = save(sl.state(model, "a"))
    other = net()
    adapter = sl.SparseMagnitude()
    sl.load(other, adapter, sl.fitting(other, adapter), "a", load(stored))
    assert torch.equal(other(x), model(x))
    assert hash_model(sl.merged(other)) == hash_model(sl.merged(model))
    assert hash_model(sl.remove(model)) == before


def test_sara_invariant_7_size_of_the_file():
    model = attach(nn.Sequential(nn.Linear(300, 300)), sl.SparseMagnitude(0.2))
    size = len(save(sl.state(model, "a")))
    assert 8 * sl.count(model, "a") <= size < 8 * sl.count(model, "a") + 1_000


def test_sara_invariant_8_density():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 90), nn.Conv2d(9, 10, 3))
    whole = sum(p.numel() for p in model.parameters())
    for n, rule in enumerate(("magnitude-low", "magnitude-high", "random")):
        for share in (0.05, 0.2, 0.7):
            group = f"{rule}{int(100 * share)}"
            adapter = sl.SparseMagnitude(share, rule=rule)
            adapter.attach(model, sl.fitting(model, adapter), group, n)
            assert sl.count(model, group) / whole == pytest.approx(share, abs=1e-3)


def test_rules_choose_what_they_say():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30))
    weights = flat(own(model))
    picked = {}
    model(torch.randn(50, 20)).square().sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    for rule in ("magnitude-low", "magnitude-high", "saliency", "random"):
        adapter = sl.SparseMagnitude(0.3, rule=rule)
        adapter.attach(model, ["0"], rule, 5)
        one = sl.maps_of(model, rule)["0"]
        parts = [torch.zeros(n, dtype=torch.bool) for n in (600, 30)]
        for name, part in zip(("weight", "bias"), parts, strict=True):
            part[one.index(name).long()] = True
        picked[rule] = torch.cat(parts)
    small = picked["magnitude-low"]
    assert weights[small].abs().max() < weights[~small].abs().min()
    large = picked["magnitude-high"]
    assert weights[large].abs().min() > weights[~large].abs().max()
    salient = picked["saliency"]
    assert gradients[salient].abs().min() >= gradients[~salient].abs().max()
    share = (picked["random"] & small).sum() / small.sum()
    assert 0.15 < share < 0.45


def test_saliency_without_gradients_and_magnitudes_of_none():
    with pytest.raises(SettingError, match="backward"):
        attach(net(), sl.SparseMagnitude(rule="saliency"))
    with pytest.raises(SettingError, match="magnitudes"):
        sl.SparseMagnitude(threshold=0.1, rule="random")
    model = attach(net(), sl.SparseMagnitude(0.3, rule="random"))
    with pytest.raises(SettingError, match="small magnitude"):
        reselect(model, "a")
    sl.LoRA(1).attach(model, ["4"], "b", 0)
    with pytest.raises(SettingError, match="not sparse"):
        densities(model, "b")
    with pytest.raises(ModelError, match="no weights"):
        sl.SparseMagnitude().attach(model, ["2"], "c", 0)


def test_another_base_or_another_module_is_refused():
    model = attach(net(), sl.SparseMagnitude(0.3))
    stored, adapter = sl.state(model, "a"), sl.SparseMagnitude()
    modules = sl.fitting(net(), adapter)
    with pytest.raises(ModelError, match="same base"):
        sl.load(net(1), adapter, modules, "a", stored)
    one_bit = net()
    one_bit[4].bias.data[0] = torch.nextafter(one_bit[4].bias.data[0], torch.tensor(9.0))
    if "4.bias_index" in stored:
        with pytest.raises(ModelError, match="same base"):
            sl.load(one_bit, adapter, modules, "a", stored)
    with pytest.raises(ModelError, match="not the tensors"):
        sl.load(net(), adapter, modules, "a", {n: t for n, t in stored.items() if "4." not in n})
    bad = stored | {"4.weight_index": stored["4.weight_index"] + 200}
    with pytest.raises(ModelError, match="within"):
        sl.load(net(), adapter, modules, "a", bad)


def test_biases_of_zero_are_nearly_all_chosen_and_it_says_so():
    model = net()
    nn.init.zeros_(model[0].bias)
    nn.init.zeros_(model[4].bias)
    attach(model, sl.SparseMagnitude(0.2))
    shares = densities(model, "a")
    assert shares["Conv2d.bias"] == shares["Linear.bias"] == shares["BatchNorm2d.bias"] == 1
    assert shares["BatchNorm2d.weight"] == 0 and shares["Linear.weight"] < 0.2
    attach(model, sl.SparseMagnitude(0.2, matrices=True), "b")
    shares = densities(model, "b")
    assert shares["Conv2d.bias"] == shares["BatchNorm2d.bias"] == 0 < shares["Linear.weight"]


def test_half_precision_is_compared_in_float32():
    model = nn.Sequential(nn.Linear(40, 40)).half()
    weights = flat(own(model)).float().abs()
    attach(model, sl.SparseMagnitude(threshold=0.01))
    assert sl.count(model, "a") == int((weights < torch.tensor(0.01)).sum())


def test_the_learning_rate_does_not_follow_the_threshold_unless_asked():
    model = attach(net(), sl.SparseMagnitude(threshold=0.1))
    assert SparseAdamW(model, "a").defaults["lr"] == 1e-3
    assert paper_lr(2e-3) == pytest.approx(4.97e-4, rel=1e-3)
    assert paper_lr(2e-4) == pytest.approx(9.3e-4, rel=1e-2)
    assert paper_lr(0.02) == pytest.approx(9e-7, rel=0.02)


def test_magnitudes_are_those_that_earlier_groups_give():
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    sl.ScaleShift().attach(model, ["0"], "s", 0)
    gamma = sl.maps_of(model, "s")["0"].gamma
    gamma.data[0] = 0.0
    attach(model, sl.SparseMagnitude(1 / 6, matrices=True))
    assert sl.maps_of(model, "a")["0"].index("weight").tolist() == [0, 1, 2, 3, 4, 5]


def test_every_parameter_of_a_module_not_only_weights():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=8, image_size=8, patch_size=4)  # fmt: skip
    model = ViTModel(config).eval()
    adapter = sl.SparseMagnitude(1.0)
    adapter.attach(model, sl.fitting(model, adapter), "a", 0)
    assert sl.count(model, "a") == sum(p.numel() for p in own(model).values())
    x = torch.randn(1, 3, 8, 8)
    before = model(x).last_hidden_state
    maps = sl.maps_of(model, "a")
    maps["embeddings"].delta("cls_token").data.normal_()
    assert (model(x).last_hidden_state - before).abs().max() > 1e-3
