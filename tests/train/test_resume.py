"""A training that was interrupted goes on to the same bits, wherever it was interrupted."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from expunge.core.data import Data
from expunge.core.errors import Interrupted, UserError
from expunge.core.runtime import Runtime
from expunge.core.view import Source
from expunge.train.fit import fit

EPOCHS, BATCHES = 3, 4


class Noisy(Dataset):
    """Samples whose reading draws random numbers, as augmentations do."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(22, 5, generator=generator)
        self.targets = torch.randint(3, (22,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.randn(5), self.targets[index]


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3)
    )


def run(folder=None, fail_at=None, *, every=1, seed=0, ids=None, dtype=torch.float32, **options):
    """Train, raising at the n-th loss (counted over this call) if asked to."""
    runtime = Runtime(seed=seed, checkpoint=folder, checkpoint_every=every)
    data = Data(Noisy())
    source = Source(data, data.ids if ids is None else ids, True, runtime)
    calls = []

    def loss(model, batch):
        calls.append(batch.ids)
        if len(calls) == fail_at:
            raise Interrupted("stopped on purpose")
        logits = model(batch.x.to(dtype)).float()
        return batch.mean(cross_entropy(logits, batch.y, reduction="none"))

    def passes(epoch):
        for batch in source.batches(6, runtime.generator("pass", epoch)):
            yield loss, batch

    model = network().to(dtype)
    runtime.seed_everything("run")
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "snapshots": True, "every": 1}
    settings |= options
    result = fit(model, passes, runtime=runtime, epochs=EPOCHS, **settings)
    return model, result, runtime.cost, len(calls)


def assert_same(left, right):
    for key, value in left[0].state_dict().items():
        assert torch.equal(value, right[0].state_dict()[key]), key
    assert left[1].curve == right[1].curve
    assert left[1].steps == right[1].steps
    assert left[1].stopped == right[1].stopped
    assert len(left[1].snapshots) == len(right[1].snapshots)
    for a, b in zip(left[1].snapshots, right[1].snapshots, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert (left[2].samples, left[2].gradients) == (right[2].samples, right[2].gradients)


@pytest.mark.parametrize("step", ["sgd", "adamw"])
@pytest.mark.parametrize("at", range(2, EPOCHS * BATCHES + 1))
def test_interrupted_at_any_step_it_ends_at_the_same_bits(tmp_path, at, step):
    whole = run(step=step)
    assert whole[1].steps == EPOCHS * BATCHES
    with pytest.raises(Interrupted):
        run(tmp_path, at, step=step)
    torch.rand(3)  # the world does not stand still
    resumed = run(tmp_path, step=step)
    assert_same(whole, resumed)
    assert resumed[3] == EPOCHS * BATCHES - (at - 1)  # steps taken before are not taken again


def test_interrupted_before_the_first_checkpoint_it_starts_over(tmp_path):
    whole = run()
    with pytest.raises(Interrupted):
        run(tmp_path, 1)
    assert_same(whole, run(tmp_path))


@pytest.mark.parametrize("every", [3, 5])
def test_rare_checkpoints_and_several_interruptions(tmp_path, every):
    whole = run()
    with pytest.raises(Interrupted):
        run(tmp_path, 8, every=every)
    with pytest.raises(Interrupted):
        run(tmp_path, 4, every=every)
    resumed = run(tmp_path, every=every)
    assert_same(whole, resumed)
    assert resumed[3] < EPOCHS * BATCHES


def test_a_finished_training_is_not_repeated(tmp_path):
    whole = run(tmp_path)
    again = run(tmp_path)
    assert_same(whole, again)
    assert again[3] == 0


def test_with_accumulation_and_a_mask(tmp_path):
    model = network()
    generator = torch.Generator().manual_seed(3)
    mask = {n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in model.named_parameters()}
    options = {"accumulate": 2, "mask": mask, "step": "adam"}
    whole = run(**options)
    for at in (4, 5, 8):
        with pytest.raises(Interrupted):
            run(tmp_path / str(at), at, **options)
        assert_same(whole, run(tmp_path / str(at), **options))


@pytest.mark.parametrize("turns", [(), (1e-3, 2e-3)])
def test_half_precision_goes_on_with_the_copies_it_had(tmp_path, turns):
    """Steps too small to show in a weight are in its float32 copy; rounding would lose them."""
    options = {"dtype": torch.bfloat16, "lr": 1e-3, "momentum": 0.0, "turns": turns}
    generator = torch.Generator().manual_seed(3)
    options["mask"] = {
        n: torch.rand(p.shape, generator=generator) < 0.7 for n, p in network().named_parameters()
    }
    whole = run(**options)
    for at in (3, 6, 11):
        with pytest.raises(Interrupted):
            run(tmp_path / str(at), at, **options)
        assert_same(whole, run(tmp_path / str(at), **options))


@pytest.mark.parametrize("ruined", [0, 1, 2])
def test_weights_ruined_before_the_checkpoint_are_put_back_after_it(tmp_path, ruined):
    """The loss that shows it comes after the checkpoint; the place to fall back to is older."""
    options = {
        "lr": 1.0,
        "schedule": lambda epoch: 0.05 if epoch < ruined else 1e38,
        "weight_decay": 0.0 if ruined else 1.0,
    }
    whole = run(**options)
    assert "the loss was nan" in whole[1].stopped
    assert ruined * BATCHES < whole[1].steps < (ruined + 1) * BATCHES
    assert all(bool(torch.isfinite(v).all()) for v in whole[0].state_dict().values())
    if ruined:  # what the epoch in which it happened began with
        before = whole[1].snapshots[ruined - 1]
        assert all(torch.equal(before[k], v) for k, v in whole[0].state_dict().items())
    with pytest.raises(Interrupted):
        run(tmp_path, whole[3], **options)  # the checkpoint holds the ruined weights
    resumed = run(tmp_path, **options)
    assert resumed[3] == 1
    assert_same(whole, resumed)


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"lr": 0.06}, {"ids": torch.arange(21)}, {"step": "adam"}]
)
def test_the_checkpoint_of_another_training_is_refused(tmp_path, other):
    with pytest.raises(Interrupted):
        run(tmp_path, 6)
    with pytest.raises(UserError, match="belongs to another training"):
        run(tmp_path, **other)


def test_checkpoints_hold_no_code(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, 6)
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".pt"
    state = torch.load(path, weights_only=True)
    assert state["steps"] == 5
