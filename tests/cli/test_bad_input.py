"""Bad input: one line on standard error, the right exit code, no traceback, nothing written."""

from __future__ import annotations

import json
import pickle
import sys

import numpy as np
import pytest
import torch

from expunge.cli.__main__ import main


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny untrained ViT for 8×8 grey images and 10 classes."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16, num_labels=10,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch, model_folder):
    """A folder with a model, data and a forget file that work; tests spoil one of them."""
    import shutil

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EXPUNGE_STORE", raising=False)
    shutil.copytree(model_folder, tmp_path / "model")
    save_data(tmp_path / "data.npz")
    (tmp_path / "forget.csv").write_text("id\n0\n1\n2\n")
    return tmp_path


def save_data(path, *, classes=10, nan=False, labelled=True, count=20):
    rng = np.random.default_rng(0)
    x = rng.random((count, 1, 8, 8), dtype=np.float32)
    if nan:
        x[3, 0, 2, 2] = np.nan
    y = {"y": np.arange(count) % classes} if labelled else {}
    np.savez(path, X=x, **y)


DISK = ("--model", "model", "--data", "data.npz", "--forget", "forget.csv", "--out", "out")


def expunge(capsys, monkeypatch, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["expunge", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def complaint(err: str) -> str:
    """The one line that is ours; progress lines (JSON) are not counted."""
    lines = [line for line in err.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, err
    assert lines[0].startswith("expunge: ")
    assert "Traceback" not in err
    return lines[0]


def tree(place) -> dict[str, int]:
    return {str(p.relative_to(place)): p.stat().st_size for p in place.rglob("*")}


def spoil_nothing(place):
    return DISK


def spoil_ids(place):
    (place / "forget.csv").write_text("id\n1\n77777\n")
    return DISK


def spoil_empty(place):
    (place / "forget.csv").write_text("id\n")
    return DISK


def spoil_all(place):
    (place / "forget.csv").write_text("id\n" + "\n".join(map(str, range(20))) + "\n")
    return DISK


def spoil_labels(place):
    save_data(place / "data.npz", labelled=False)
    return DISK


def spoil_weights_away(place):
    (place / "model" / "model.safetensors").unlink()
    return DISK


def spoil_weights_cut(place):
    path = place / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-200])
    return DISK


def spoil_weights_pickle(place):
    path = place / "model" / "model.safetensors"
    path.write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
    return DISK


def spoil_weights_bin(place):
    (place / "model" / "model.safetensors").unlink()
    torch.save({"a": torch.ones(1)}, place / "model" / "pytorch_model.bin")
    return DISK


def spoil_nan(place):
    save_data(place / "data.npz", nan=True)
    return DISK


def spoil_classes(place):
    save_data(place / "data.npz", classes=12)
    return DISK


def spoil_out(place):
    (place / "out").mkdir()
    (place / "out" / "mine.txt").write_text("keep me")
    return DISK


CASES = [
    (spoil_ids, ("--method", "ssd"), "77777"),
    (spoil_empty, ("--method", "ssd"), "forget.csv"),
    (spoil_all, ("--method", "ssd"), "all 20 samples"),
    (spoil_labels, ("--method", "finetune"), "needs labels"),
    (spoil_weights_away, ("--method", "ssd"), "safetensors"),
    (spoil_weights_cut, ("--method", "ssd"), "safetensors"),
    (spoil_weights_pickle, ("--method", "ssd"), "safetensors"),
    (spoil_weights_bin, ("--method", "ssd"), "pickle"),
    (spoil_nan, ("--method", "ssd"), "NaN"),
    (spoil_classes, ("--method", "ssd"), "10 classes"),
    (spoil_out, ("--method", "ssd"), "out"),
    (spoil_nothing, ("--method", "sdd"), "did you mean ssd"),
    (spoil_nothing, ("--method", "finetune", "--set", "lr=-1"), "lr must be above 0"),
    (spoil_nothing, ("--method", "finetune", "--set", "lrr=1"), "no setting 'lrr'"),
    (spoil_nothing, ("--method", "finetune", "--set", "epochs=many"), "a whole number"),
    (spoil_nothing, ("--method", "finetune", "--set", "train=half"), "train='half'"),
    (spoil_nothing, ("--method", "retrain"), "recipe"),
    (spoil_nothing, ("--method", "ssd", "--label", "3"), "exactly one"),
    (spoil_nothing, ("--method", "ssd", "--workload", "digits-class"), "either --workload"),
    (spoil_nothing, ("--method", "ssd", "--nonsense", "1"), "--nonsense"),
]


@pytest.mark.parametrize(
    ("spoil", "words", "says"), CASES, ids=lambda v: getattr(v, "__name__", None)
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(
    place, capsys, monkeypatch, spoil, words, says
):
    arguments = spoil(place)
    before = tree(place)
    code, out, err = expunge(capsys, monkeypatch, "unlearn", *arguments, *words)
    assert says in complaint(err)
    assert (code, out) == (2, "")
    assert tree(place) == before


def test_good_input_is_accepted(place, capsys, monkeypatch):
    """The cases above fail for the reason they name, not because nothing works."""
    code, out, err = expunge(
        capsys, monkeypatch, "unlearn", *DISK, "--method", "finetune", "--set", "epochs=1", "--json"
    )
    assert code == 0, err
    shown = json.loads(out)
    assert shown["out"] == "out"
    assert (place / "out" / "model.safetensors").exists()
    assert shown["cost"]["samples"] == 17


def test_output_that_cannot_be_written_is_exit_1(place, capsys, monkeypatch):
    (place / "file").write_text("a file, not a folder")
    words = [*DISK[:-1], "file/out", "--method", "finetune", "--set", "epochs=1"]
    code, out, err = expunge(capsys, monkeypatch, "unlearn", *words)
    assert code == 1
    assert out == ""
    assert "file" in complaint(err)
    assert (place / "file").read_text() == "a file, not a folder"


def test_full_disk_is_exit_1_and_leaves_nothing(place):
    """A limit on file sizes stands for a full disk: every write past it fails."""
    import subprocess

    script = (
        "import resource, signal, sys, torch, transformers\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "from expunge.cli.__main__ import main\n"
        f"sys.argv = ['expunge', 'unlearn', *{DISK!r}, '--method', 'finetune', '--set', 'epochs=1']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", script], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "expunge: " in complaint(done.stderr)
    assert not (place / "out").exists()


def test_store_of_a_newer_version_is_refused(place, capsys, monkeypatch):
    import sqlite3

    expunge(capsys, monkeypatch, "unlearn", *DISK, "--method", "finetune", "--set", "epochs=1")
    with sqlite3.connect(place / ".expunge" / "store.sqlite") as database:
        database.execute("update alembic_version set version_num = '9999_from_the_future'")
    before = tree(place)
    code, _, err = expunge(capsys, monkeypatch, "runs", "list")
    assert code == 2
    assert "newer" in complaint(err)
    code, _, err = expunge(
        capsys, monkeypatch, "unlearn", *DISK[:-1], "other", "--method", "finetune"
    )
    assert code == 2
    assert "newer" in complaint(err)
    assert tree(place) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("runs", "show", "zzz"), "zzz"),
        (("reproduce", "zzz"), "zzz"),
        (("audit", "zzz"), "zzz"),
        (("report", "zzz"), "zzz"),
        (("suite", "resume"), "no suite"),
        (("suite", "run", "missing.toml"), "missing.toml"),
        (("methods", "show", "nothing"), "no method"),
        (("audits", "show", "nothing"), "no audit"),
        (("workloads", "show", "mnist"), "did you mean"),
        (("compare", "--workload", "digits-class", "--methods", "ssd", "--seeds", "x"), "--seeds"),
        (("demo", "--label", "12"), "--label"),
    ],
)
def test_other_commands_complain_the_same_way(place, capsys, monkeypatch, words, says):
    before = tree(place)
    code, out, err = expunge(capsys, monkeypatch, *words)
    assert says in complaint(err)
    assert (code, out) == (2, "")
    assert tree(place) == before


def test_a_bad_suite_file_is_named(place, capsys, monkeypatch):
    (place / "bad.toml").write_text('name = "x"\nmethods = ["ssd"]\nproblem = []\n')
    code, _, err = expunge(capsys, monkeypatch, "suite", "run", "bad.toml")
    assert code == 2
    assert "problem" in complaint(err)
