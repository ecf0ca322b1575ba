"""Random histories of a store, compared with a plain dict that is told the same."""

import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expunge.store import Store
from expunge.store.diff import differences

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
RECORDS = st.dictionaries(
    st.sampled_from(["problem", "method", "runtime", "seed", "weights", "details", "é"]),
    JSON,
    max_size=4,
)
PUTS = st.fixed_dictionaries({
    "kind": st.sampled_from(["original", "unlearn"]),
    "key": st.sampled_from(["a", "b", "c", "d"]),
    "status": st.sampled_from(["done", "done", "failed"]),
    "record": RECORDS,
    "tensor": st.none() | st.integers(0, 2),
    "parents": st.lists(st.integers(0, 20), max_size=2),
})
STEPS = st.lists(PUTS | st.just("gc") | st.just("reopen"), min_size=1, max_size=7)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS, chosen=st.lists(st.integers(0, 20), min_size=1, max_size=3))
def test_a_store_remembers_exactly_what_it_was_told(steps, chosen):
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(Path(folder) / "s")
        told: dict[str, dict] = {}
        done: dict[tuple[str, str], str] = {}
        for step in steps:
            if step == "gc":
                assert store.gc() == []
            elif step == "reopen":
                store = Store.open(store.folder)
            else:
                parents = [list(told)[i % len(told)] for i in step["parents"] if told]
                number = step["tensor"]
                tensors = None if number is None else {"w": torch.full((3,), float(number))}
                given_ = {k: step[k] for k in ("kind", "key", "status", "record")}
                run = store.put_run(**given_, tensors=tensors, parents=parents)
                name = (step["kind"], step["key"])
                if step["status"] == "done" and name in done:
                    assert run == done[name]
                    continue
                assert run not in told
                told[run] = {**given_, "tensor": number, "parents": tuple(dict.fromkeys(parents))}
                if step["status"] == "done":
                    done[name] = run
        check(store, told)
        if not told:
            return

        ids = [list(told)[i % len(told)] for i in chosen]
        store.export(ids, Path(folder) / "x.tar")
        other = Store.open(Path(folder) / "t")
        added = other.import_(Path(folder) / "x.tar")
        closure = set()
        waiting = list(ids)
        while waiting:
            run = waiting.pop()
            closure.add(run)
            waiting += set(told[run]["parents"]) - closure
        assert set(added) == closure
        check(other, {run: told[run] for run in told if run in closure})
        assert other.gc() == []
        assert store.import_(Path(folder) / "x.tar") == []
        assert not any(store.diff(run, run, True) for run in told)


def check(store, told):
    assert [r.id for r in store.runs()] == sorted(told, reverse=True)
    for name, expected in told.items():
        run = store.get(name)
        shown = {k: getattr(run, k) for k in ("kind", "key", "status", "record", "parents")}
        assert shown == {k: v for k, v in expected.items() if k != "tensor"}
        tensors = store.tensors(name)
        number = expected["tensor"]
        assert [t.tolist() for t in tensors.values()] == ([] if number is None else [[number] * 3])
    blobs = {r.blob for r in store.runs() if r.blob}
    assert {p.stem for p in store.folder.rglob("*.safetensors")} == blobs


@settings(max_examples=60, deadline=None)
@given(a=RECORDS, b=RECORDS, setting=st.text(min_size=1, max_size=5), value=st.integers(1, 9))
def test_differences_are_antisymmetric_and_one_changed_setting_is_one_more(a, b, setting, value):
    forth, back = differences(a, b, True), differences(b, a, True)
    assert sorted((p, repr(y), repr(x)) for p, x, y in forth) == sorted(
        (p, repr(x), repr(y)) for p, x, y in back
    )
    assert differences(a, a, True) == []
    method = {"name": "m", "passed": {setting: 0}, "in_force": {setting: 0, "other": 1}}
    left = {**a, "method": method}
    right = {**a, "method": {**method, "passed": {}, "in_force": {setting: value, "other": 1}}}
    if setting != "other":
        assert differences(left, right, True) == [(f"method.{setting}", 0, value)]
