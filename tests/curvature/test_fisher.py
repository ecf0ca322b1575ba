"""Named gradient statistics against the dense oracle and each other."""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from expunge.core.data import Data
from expunge.core.runtime import Runtime
from expunge.core.view import Source
from expunge.curvature import dense, fisher

N = 23


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def loss_each(model, batch):
    return F.cross_entropy(model(batch.x), batch.y, reduction="none")


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)
    ).double()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    ids = torch.arange(N) * 3 + 1  # ids are not positions
    data = Data((torch.randn(N, 1, 8, 8, dtype=torch.float64), torch.randint(0, 4, (N,))), ids=ids)
    runtime = Runtime()
    return model, data, Source(data, ids, True, runtime), runtime


def oracle(model, data, ids=None):
    return dense.gradient_matrix(model, loss_each, list(data.batches(5, ids)))


def close(model, statistic, want):
    return (dense.flat(model, statistic.values) - want).abs().max() <= 1e-10


def test_per_sample_squares_equal_the_oracle_and_are_not_the_square_of_the_mean(case):
    model, data, source, runtime = case
    found = fisher.per_sample_squares(model, loss_each, source, runtime, chunk=4)
    matrix = oracle(model, data)
    assert close(model, found, (matrix**2).sum(0) / N)
    assert not close(model, found, matrix.mean(0) ** 2)
    assert found.kind == "per_sample_squares"
    assert found.samples == N
    assert found.batches is None


def test_per_sample_magnitudes_equal_the_oracle(case):
    model, data, source, runtime = case
    found = fisher.per_sample_magnitudes(model, loss_each, source, runtime, chunk=4)
    assert close(model, found, oracle(model, data).abs().sum(0) / N)


@pytest.mark.parametrize("size", [1, 4, 10, N])
def test_batch_statistics_equal_the_oracle_and_a_short_batch_counts_like_a_full_one(case, size):
    model, data, source, runtime = case
    order = source.ids[torch.randperm(N, generator=torch.Generator().manual_seed(3))]
    matrix = oracle(model, data, order)
    means = torch.stack([rows.mean(0) for rows in matrix.split(size)])
    arguments = {"batch_size": size, "order": order}

    squares = fisher.squared_batch_means(model, loss_each, source, runtime, **arguments)
    magnitudes = fisher.batch_mean_magnitudes(model, loss_each, source, runtime, **arguments)
    total = fisher.accumulated(model, loss_each, source, runtime, **arguments)

    assert squares.batches == -(-N // size)
    assert close(model, squares, (means**2).mean(0))
    assert close(model, magnitudes, means.abs().mean(0))
    assert close(model, total, means.sum(0))
    if N % size:
        weights = torch.tensor([len(r) / N for r in matrix.split(size)], dtype=torch.float64)
        assert not close(model, squares, (weights[:, None] * means**2).sum(0))


def test_statistics_leave_the_model_alone_and_count_their_gradients(case):
    model, _, source, runtime = case
    model.train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    fisher.squared_batch_means(model, loss_each, source, runtime, batch_size=4)
    assert runtime.cost.gradients == N
    assert runtime.cost.samples == N
    fisher.per_sample_squares(model, loss_each, source, runtime, path="vmap")

    assert runtime.cost.gradients == 2 * N
    assert runtime.cost.samples == 2 * N
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert not model[1].training
    assert all(p.grad is None for p in model.parameters())


def test_no_more_samples_are_held_than_the_runtime_says(case):
    model, _, source, runtime = case
    sizes = []

    def each(model, batch):
        sizes.append(len(batch))
        return loss_each(model, batch)

    small = fisher.per_sample_squares(model, each, source, Runtime(chunk=2))
    assert max(sizes) == 2
    whole = fisher.per_sample_squares(model, loss_each, source, runtime)
    assert all(torch.allclose(v, whole.values[n]) for n, v in small.values.items())


def test_frozen_and_unreached_parameters_have_no_importance(case):
    model, _, source, runtime = case
    model.add_module("spare", nn.Identity())
    model.spare.weight = nn.Parameter(torch.ones(3))
    model[0].weight.requires_grad_(False)
    for measure in (
        lambda: fisher.per_sample_squares(model, loss_each, source, runtime),
        lambda: fisher.squared_batch_means(model, loss_each, source, runtime, batch_size=5),
    ):
        values = measure().values
        assert "0.weight" not in values
        assert (values["spare.weight"] == 0).all()
        assert (values["4.weight"] > 0).any()


WORKER = textwrap.dedent("""
    import sys, torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn import functional as F
    from expunge.core.data import Data
    from expunge.core.runtime import Runtime
    from expunge.core.view import Source
    from expunge.curvature import fisher

    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = Data((torch.randn(13, 6, dtype=torch.float64), torch.randint(0, 3, (13,))))
    runtime = Runtime()
    source = Source(data, data.ids, True, runtime)
    each = lambda m, b: F.cross_entropy(m(b.x), b.y, reduction="none")
    found = {
        "sample": fisher.per_sample_squares(model, each, source, runtime, chunk=3).values,
        "batch": fisher.squared_batch_means(model, each, source, runtime, batch_size=4).values,
    }
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()
""")


def test_two_processes_equal_one(tmp_path):
    # 13 samples in batches of 4: the last batch holds one, so one process has an empty share
    import subprocess

    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for world, rank in ((1, 0), (2, 0), (2, 1))
    ]
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    one, first, second = (torch.load(tmp_path / f"{n}.pt") for n in ("1-0", "2-0", "2-1"))
    for kind in ("sample", "batch"):
        for name, value in one[kind].items():
            assert torch.allclose(first[kind][name], value, rtol=1e-12, atol=1e-15)
            assert torch.equal(first[kind][name], second[kind][name])
