"""Runtime: seeds that never change, counters that nest, progress."""

from __future__ import annotations

import json
import random
import time

import numpy as np
import pytest
import torch

from expunge.core.errors import SettingError
from expunge.core.outcome import Cost
from expunge.core.runtime import Budget, JsonLines, Runtime


def test_seeds_are_pinned():
    """The first six bytes of SHA-256; a change here makes every stored record unrepeatable."""
    assert Runtime(seed=0).seed_for("recipe", 1) == 0x38038509D7A7  # of "0/recipe/1"
    assert Runtime(seed=7).seed_for("run") == 0x8D84990447F0  # of "7/run"


def test_generators_depend_on_seed_and_stage_alone():
    def draw(seed, *stage):
        return torch.randperm(50, generator=Runtime(seed=seed).generator(*stage)).tolist()

    before = draw(1, "a", 0)
    torch.manual_seed(99)
    torch.rand(3)
    assert draw(1, "a", 0) == before
    assert (
        len({
            tuple(draw(s, *stage))
            for s, *stage in ((1, "a", 0), (1, "a", 1), (1, "b", 0), (2, "a", 0))
        })
        == 4
    )
    state = torch.get_rng_state()
    draw(3, "x")
    assert torch.equal(torch.get_rng_state(), state)


def test_seeding_everything_reaches_python_numpy_and_torch():
    def draws(seed, stage):
        Runtime(seed=seed).seed_everything(stage)
        return random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002

    assert draws(1, "a") == draws(1, "a")
    assert len({*draws(1, "a"), *draws(1, "b"), *draws(2, "a")}) == 9


def test_inner_work_counts_for_the_outer():
    runtime = Runtime()
    with runtime.metered() as outer:
        runtime.cost.samples += 5
        with runtime.metered() as inner:
            runtime.cost.samples += 10
            runtime.cost.gradients += 3
            time.sleep(0.02)
        assert runtime.cost is outer
        runtime.cost.gradients += 1
    assert (inner.samples, inner.gradients) == (10, 3)
    assert (outer.samples, outer.gradients) == (15, 4)
    assert 0.02 <= inner.seconds <= outer.seconds < 5
    assert runtime.cost.samples == 15


def test_cpu_seconds_leave_out_waiting():
    with Runtime(device="cpu").metered() as cost:
        time.sleep(0.2)
        sum(range(2_000_000))
    assert 0 < cost.processor < cost.seconds - 0.1


def test_cost_ratio_is_of_cpu_seconds_if_all_were_counted():
    ours, theirs = (
        Cost(seconds=9.0, processor=1.0),
        [Cost(8.0, processor=4.0), Cost(8.0, processor=6.0)],
    )
    assert ours.ratio(theirs) == pytest.approx(0.2)
    assert ours.ratio([*theirs, Cost(seconds=11.0)]) == pytest.approx(1.0)  # wall seconds: 9 to 9
    assert ours.ratio([]) is None and Cost().ratio([Cost()]) is None


def test_counters_survive_a_failure():
    runtime = Runtime()
    before = runtime.cost

    def fails():
        with runtime.metered() as cost:
            cost.samples += 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert runtime.cost is before
    assert before.samples == 2


def test_memory_grows_by_what_is_allocated():
    runtime = Runtime()
    size = 64 * 2**20
    with runtime.metered() as large:
        tensor = torch.ones(size // 4)
        time.sleep(0.03)
        del tensor
    with runtime.metered() as small:
        time.sleep(0.03)
    assert 0.9 * size < large.peak_bytes < 3 * size
    assert small.peak_bytes < size / 2


def test_memory_of_short_work_is_seen():
    with Runtime().metered() as cost:
        tensor = torch.ones(16 * 2**20)
    assert cost.peak_bytes > 0.9 * 4 * tensor.numel()


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with Runtime(threads=before + 1).metered():
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_descriptions_hold_what_a_result_depends_on():
    described = Runtime(seed=3, threads=2).describe()
    assert described == {
        "device": "cpu",
        "precision": "no",
        "processes": 1,
        "threads": 2,
        "seed": 3,
    }
    limited = Runtime(budget=Budget(steps=5)).describe()
    assert limited["budget"] == {"seconds": None, "steps": 5}


def test_a_chunk_is_described_where_it_is_set_and_holds_a_sample_at_least():
    assert "chunk" not in Runtime().describe()
    assert Runtime(chunk=16).describe()["chunk"] == 16
    with pytest.raises(SettingError, match="at least 1 sample, not 0"):
        Runtime(chunk=0)


def test_one_process_shares_nothing():
    runtime = Runtime()
    items = torch.arange(5)
    assert runtime.processes == 1
    assert runtime.is_main
    assert torch.equal(runtime.share(items), items)
    assert torch.equal(runtime.sum(items.clone()), items)


def test_progress_as_json_lines(capsys):
    runtime = Runtime(reporter=JsonLines())
    with runtime.task("train", 3) as task:
        for _ in range(3):
            task.advance()
    runtime.reporter.say("done")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["start", "finish", "message"]
    assert lines[0]["total"] == 3
    assert lines[1]["done"] == 3


def test_a_task_ends_even_when_it_fails(capsys):
    runtime = Runtime(reporter=JsonLines())
    with pytest.raises(ValueError), runtime.task("train"):
        raise ValueError
    assert "finish" in capsys.readouterr().err
