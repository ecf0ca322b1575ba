"""The training loop: it is plain training, masks are hard, it stops where it should."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from expunge.core.data import Batch, Data
from expunge.core.errors import SettingError
from expunge.core.runtime import Budget, Runtime
from expunge.core.view import Source
from expunge.train.fit import fit
from expunge.train.steps import make_optimizer

SIZE, STEPS_AN_EPOCH = 24, 4
STEPS = [("sgd", 0.9), ("adam", 0.0), ("adamw", 0.0)]


@pytest.fixture
def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SIZE, 5, generator=generator)
    return Data((x, torch.randint(3, (SIZE,), generator=generator)))


def network(dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(5, 8),
        nn.BatchNorm1d(8) if norm else nn.Identity(),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(8, 3),
    )


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return batch.mean(cross_entropy(model(batch.x), batch.y, reduction="none"))


def passes_over(data, runtime, size=SIZE // STEPS_AN_EPOCH, shuffled=True):
    source = Source(data, data.ids, True, runtime)

    def passes(epoch):
        generator = runtime.generator("pass", epoch) if shuffled else None
        for batch in source.batches(size, generator):
            yield loss, batch

    return passes


def train(model, data, runtime=None, size=SIZE // STEPS_AN_EPOCH, shuffled=True, **options):
    runtime = runtime or Runtime()
    settings = {"epochs": 3, "lr": 0.1, "every": 1, **options}
    return fit(model, passes_over(data, runtime, size, shuffled), runtime=runtime, **settings)


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(left[k], right[k]) for k in left)


# ------------------------------------------------------------------ plain training


@pytest.mark.parametrize(("step", "momentum"), STEPS)
def test_it_is_a_plain_loop(data, step, momentum):
    model = network()
    plain = copy.deepcopy(model).train()
    options = {"step": step, "momentum": momentum, "weight_decay": 0.01}
    result = train(model, data, schedule=lambda e: 1 / (e + 1), **options)

    parameters = list(plain.parameters())
    if step == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)
    elif step == "adam":
        optimizer = torch.optim.Adam(parameters, lr=0.1, weight_decay=0.01)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.01)
    curve = []
    for epoch in range(3):
        order = torch.randperm(SIZE, generator=Runtime().generator("pass", epoch))
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (epoch + 1)
        for chunk in order.split(6):
            optimizer.zero_grad()
            value = cross_entropy(plain(data._x[chunk]), data._labels[chunk])
            value.backward()
            optimizer.step()
            curve.append((epoch, float(value.detach()), 0.1 / (epoch + 1)))
    for got, wanted in zip(model.parameters(), parameters, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert [p["step"] for p in result.curve] == list(range(1, 13))
    assert result.steps == 12
    for point, (epoch, value, rate) in zip(result.curve, curve, strict=True):
        assert (point["epoch"], point["lr"]) == (epoch, pytest.approx(rate))
        assert point["loss"] == pytest.approx(value, abs=1e-5)
    assert result.stopped is None
    assert not model.training


def test_every_sample_is_counted_once_a_pass(data):
    runtime = Runtime()
    train(network(), data, runtime)
    assert (runtime.cost.samples, runtime.cost.gradients) == (3 * SIZE, 3 * SIZE)


def test_the_curve_keeps_every_nth_step(data):
    assert [p["step"] for p in train(network(), data, every=5).curve] == [1, 6, 11]


def test_snapshots_are_the_weights_after_each_epoch(data):
    model = network()
    result = train(model, data, snapshots=True)
    for epochs, snapshot in enumerate(result.snapshots, start=1):
        shorter = network()
        train(shorter, data, epochs=epochs)
        assert all(torch.equal(snapshot[k], v) for k, v in shorter.state_dict().items())
    assert len(result.snapshots) == 3


@pytest.mark.parametrize(("step", "momentum"), STEPS)
def test_two_half_batches_accumulated_are_one_whole_batch(data, step, momentum):
    """Without batch norm and with equal halves the mean of two means is the mean."""
    whole, halves = network(), network()
    options = {"step": step, "momentum": momentum, "weight_decay": 0.01, "lr": 0.05}
    one = train(whole, data, size=8, **options)
    two = train(halves, data, size=4, accumulate=2, **options)
    assert one.steps == two.steps == 9
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_remainder_of_accumulation_is_dropped(data):
    short, full = network(), network()
    assert train(short, data, size=8, accumulate=2, epochs=1, shuffled=False).steps == 1
    first = Data((data._x[:16], data._labels[:16]))
    train(full, first, size=16, epochs=1, shuffled=False)
    for a, b in zip(short.parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_step(data):
    model, before = network(), network()
    result = train(model, data, epochs=1, size=SIZE, lr=1.0, clip=1e-3)
    assert result.steps == 1
    moved = torch.cat([
        (a - b).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)
    ])
    assert float(moved.detach().norm()) == pytest.approx(1e-3, rel=1e-3)
    free = network()
    train(free, data, epochs=1, size=SIZE, lr=1.0, clip=1e6)
    unclipped = network()
    train(unclipped, data, epochs=1, size=SIZE, lr=1.0)
    assert same(free, unclipped)


def test_the_model_may_be_trained_in_bfloat16_and_comes_back_plain(data):
    """Accelerate remembers the first precision of a process; one run must not bind the next."""
    exact, rough = network(), network()
    train(exact, data)
    train(rough, data, Runtime(precision="bf16"))
    assert rough(torch.randn(2, 5)).dtype == torch.float32
    assert "forward" not in vars(rough)
    assert rough[0].weight.dtype == torch.float32
    assert not same(exact, rough)
    for a, b in zip(exact.parameters(), rough.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.2, atol=0.05)
    again = network()
    train(again, data)
    assert same(exact, again)


def test_somebody_elses_accelerator_keeps_working(data):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    theirs = Accelerator(cpu=True, mixed_precision="bf16")
    try:
        train(network(), data)
        assert theirs.mixed_precision == "bf16"
        assert theirs.device.type == "cpu"
        assert theirs.num_processes == 1
    finally:
        AcceleratorState._shared_state.clear()
        PartialState._shared_state.clear()


def test_a_last_batch_of_one_sample_uses_the_running_statistics(data):
    """Batch norm cannot train on one sample; its step is taken as at inference."""
    model, plain = network(norm=True), network(norm=True)
    some = Data((data._x[:13], data._labels[:13]))
    result = train(model, some, size=12, epochs=1, shuffled=False, norm="train")
    assert result.steps == 2
    plain.train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for chunk in (slice(0, 12), slice(12, 13)):
        plain[1].train(chunk.start == 0)
        optimizer.zero_grad()
        cross_entropy(plain(data._x[chunk]), data._labels[chunk]).backward()
        optimizer.step()
    assert model[1].num_batches_tracked == 1
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ half precision


def half_loss(model, batch):
    return batch.mean(cross_entropy(model(batch.x.bfloat16()).float(), batch.y, reduction="none"))


def half_passes(data):
    def passes(epoch):
        for chunk in data.ids.split(6):
            yield half_loss, data.fetch(chunk)

    return passes


@pytest.mark.parametrize("step", ["sgd", "adamw"])
def test_half_precision_weights_move_by_steps_too_small_for_one_of_them(data, step):
    """Steps add up in float32 copies, with gradients at the rounded weights."""
    model = network().bfloat16()
    before, plain = copy.deepcopy(model), copy.deepcopy(model)
    fit(model, half_passes(data), runtime=Runtime(), epochs=30, lr=1e-4, step=step, momentum=0.9)
    copies = [p.detach().float().requires_grad_() for p in plain.parameters()]
    optimizer = make_optimizer(step, copies, lr=1e-4, momentum=0.9)
    naive = make_optimizer(step, (rounded := copy.deepcopy(plain)).parameters(), lr=1e-4, momentum=0.9)  # fmt: skip
    for _ in range(30):
        for _, batch in half_passes(data)(0):
            plain.zero_grad()
            half_loss(plain, batch).backward()
            for wide, p in zip(copies, plain.parameters(), strict=True):
                wide.grad = p.grad.float()
            optimizer.step()
            for wide, p in zip(copies, plain.parameters(), strict=True):
                p.data.copy_(wide)
            naive.zero_grad()
            half_loss(rounded, batch).backward()
            naive.step()
    assert same(model, plain)

    def moved(other):
        pairs = list(zip(other.parameters(), before.parameters(), strict=True))
        return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)

    assert moved(model) > 0.8
    assert moved(model) > 1.5 * moved(rounded)


@pytest.mark.parametrize("decay", [0.3, 0.0])
def test_half_precision_frozen_coordinates_stay_the_same_to_the_bit(data, decay):
    model, before = network().bfloat16(), network().bfloat16()
    mask = random_mask(model)
    fit(
        model, half_passes(data), runtime=Runtime(), epochs=3, lr=0.1, momentum=0.9,
        weight_decay=decay, mask=mask, clip=1.0,
    )  # fmt: skip
    for (name, p), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert p.dtype == torch.bfloat16
        assert torch.equal(p[~mask[name]], old[~mask[name]]), name
        assert not decay or bool((p != old)[mask[name]].all()), name


# ------------------------------------------------------------------ masks


def random_mask(model: nn.Module, share: float = 0.4):
    generator = torch.Generator().manual_seed(5)
    return {
        n: torch.rand(p.shape, generator=generator) < share for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("decay", [0.3, 0.0])
@pytest.mark.parametrize(("step", "momentum"), STEPS)
def test_frozen_coordinates_stay_the_same_to_the_bit(data, step, momentum, decay):
    model, before = network(norm=True), network(norm=True)
    mask = random_mask(model)
    mask["4.weight"][:] = False  # a whole tensor, and a whole layer of another
    train(model, data, step=step, momentum=momentum, weight_decay=decay, mask=mask, clip=1.0)
    for name, p in model.named_parameters():
        old = dict(before.named_parameters())[name]
        frozen = ~mask[name]
        assert torch.equal(p[frozen].view(-1), old[frozen].view(-1)), name
        # without decay a unit that is never active has no gradient
        assert not decay or bool((p[mask[name]] != old[mask[name]]).all()), name


@pytest.mark.parametrize(("step", "momentum"), STEPS)
def test_a_full_mask_is_no_mask(data, step, momentum):
    masked, free = network(), network()
    options = {"step": step, "momentum": momentum, "weight_decay": 0.1}
    everything = {n: torch.ones_like(p, dtype=torch.bool) for n, p in masked.named_parameters()}
    train(masked, data, mask=everything, **options)
    train(free, data, **options)
    assert same(masked, free)


def test_masked_momentum_is_that_of_the_moving_coordinates_alone(data):
    """Training a masked layer equals training a model in which the rest are constants."""
    model = network()
    mask = {
        n: torch.full_like(p, n.startswith("4."), dtype=torch.bool)
        for n, p in model.named_parameters()
    }
    train(model, data, momentum=0.9, weight_decay=0.1, mask=mask)
    plain = network().train()
    plain[0].requires_grad_(False)
    optimizer = make_optimizer("sgd", plain[4].parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for epoch in range(3):
        order = torch.randperm(SIZE, generator=Runtime().generator("pass", epoch))
        for chunk in order.split(6):
            optimizer.zero_grad()
            cross_entropy(plain(data._x[chunk]), data._labels[chunk]).backward()
            optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_clipping_looks_at_the_coordinates_that_move(data):
    """A frozen coordinate with a huge gradient must not shrink the steps of the others."""
    model = nn.Linear(5, 3)
    huge = Data((torch.cat([data._x[:, :4], data._x[:, 4:] * 1e6], 1), data._labels))
    mask = {"weight": torch.ones(3, 5, dtype=torch.bool), "bias": torch.zeros(3, dtype=torch.bool)}
    mask["weight"][:, 4] = False
    with torch.no_grad():
        model.weight[:, 4] = 0
    before = model.weight.detach().clone()
    train(model, huge, epochs=1, size=SIZE, lr=1.0, clip=1e-2, mask=mask)
    assert float((model.weight - before).detach().norm()) == pytest.approx(1e-2, rel=1e-3)


def test_an_overflow_in_a_frozen_coordinate_does_no_harm():
    class Steep(nn.Module):
        """The gradient of `b` is infinite at 0, that of `a` is 1."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 0.0]))

        def forward(self, x):
            return (self.w[0] + self.w[1].sqrt()) * x

    model = Steep()
    mask = {"w": torch.tensor([True, False])}
    data = Data((torch.ones(4), [0, 0, 0, 0]))

    def mean(model, batch):
        return batch.mean(model(batch.x))

    def passes(epoch):
        yield mean, data.fetch(data.ids)

    fit(model, passes, runtime=Runtime(), epochs=2, lr=0.1, mask=mask, clip=10.0, momentum=0.9)
    assert model.w.tolist() == pytest.approx([1.0 - 0.1 - 0.19, 0.0])


def test_a_mask_that_freezes_everything_is_refused(data):
    model = network()
    nothing = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    with pytest.raises(SettingError, match="no weight may move"):
        train(model, data, mask=nothing)


@pytest.mark.parametrize("masked", [False, True])
def test_what_the_model_freezes_stays_frozen_and_says_so(data, masked):
    model, before = network(), network()
    model[0].weight.requires_grad_(False)
    mask = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    train(model, data, weight_decay=0.1, mask=mask if masked else None)
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[4].weight, before[4].weight)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert flags == {n: n != "0.weight" for n in flags}


# ------------------------------------------------------------------ stopping


@pytest.mark.parametrize("steps", [0, 1, 4, 5, 11])
def test_a_budget_of_steps_is_exact(data, steps):
    model = network()
    result = train(model, data, Runtime(budget=Budget(steps=steps)))
    assert result.steps == steps
    assert result.stopped == f"budget of {steps} steps used"
    unlimited = network()
    full = train(unlimited, data)
    assert [p["loss"] for p in result.curve] == [p["loss"] for p in full.curve[:steps]]
    if not steps:
        assert same(model, network())


def test_a_budget_that_just_suffices_stops_nothing(data):
    result = train(network(), data, Runtime(budget=Budget(steps=12)))
    assert (result.steps, result.stopped) == (12, None)


def test_a_budget_of_seconds_ends_training(data):
    result = train(network(), data, Runtime(budget=Budget(seconds=0.1)), epochs=10**6)
    assert result.stopped == "budget of 0.1 s used"
    assert result.steps > 0


def test_a_stop_callback_sees_each_loss(data):
    seen = []

    def stop(value):
        seen.append(value)
        return "low enough" if len(seen) == 6 else None

    model = network()
    result = train(model, data, stop=stop)
    assert (result.stopped, result.steps) == ("low enough", 5)
    assert seen[:5] == [p["loss"] for p in result.curve]


def breaking(at: int, value: float):
    """A loss that turns `value` at its n-th call, after which it has already touched the model."""
    calls = []

    def loss_of(model, batch):
        calls.append(0)
        each = cross_entropy(model(batch.x), batch.y, reduction="none")
        return batch.mean(each) * (value if len(calls) == at else 1.0)

    return loss_of


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 2, 5, 7])
def test_a_loss_that_is_not_finite_stops_with_the_weights_of_the_epochs_start(data, at, value):
    model = network(norm=True)
    runtime = Runtime()
    loss_of = breaking(at, value)

    def passes(epoch):
        for _, batch in passes_over(data, runtime)(epoch):
            yield loss_of, batch

    result = fit(model, passes, runtime=runtime, epochs=3, lr=0.1, momentum=0.9)
    assert result.steps == at - 1
    assert "the loss was" in result.stopped
    wanted = network(norm=True)
    # the first loss of an epoch confirms its weights; before it, those of the epoch before hold
    epochs = (at - 2) // STEPS_AN_EPOCH if at > 1 else 0
    if epochs:
        train(wanted, data, epochs=epochs, momentum=0.9)
    assert same(model, wanted)


def test_weights_that_overflow_in_the_last_step_are_not_returned(data):
    model = network()
    result = train(model, data, epochs=1, size=SIZE, lr=1e38, weight_decay=1e38)
    assert "no longer finite" in result.stopped
    assert same(model, network())


def test_diverging_training_ends_with_finite_weights(data):
    model = network(norm=True)
    result = train(model, data, epochs=50, lr=1e38, momentum=0.9)
    assert result.stopped
    assert all(bool(torch.isfinite(v).all()) for v in model.state_dict().values())


def test_no_gradients_are_left_behind(data):
    """Neither of the batch at which a budget ended, nor of a remainder that made no step."""
    for runtime, more in ((Runtime(budget=Budget(steps=2)), {}), (Runtime(), {"accumulate": 3})):
        model = network()
        train(model, data, runtime, **more)
        assert all(p.grad is None for p in model.parameters())


def test_one_process_that_shards_has_the_precision_asked_for(data):
    curves = [
        train(network(), data, Runtime(precision=precision, shard=shard)).curve
        for precision, shard in (("bf16", False), ("bf16", True), ("no", False))
    ]
    assert curves[0] == curves[1] != curves[2]
