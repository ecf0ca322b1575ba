"""Importing is quick and pulls in nothing that is not asked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

HEAVY = {
    "transformers", "datasets", "sklearn", "matplotlib", "pandas", "scipy", "accelerate", "torch",
    "numpy", "sqlalchemy", "typer",
}  # fmt: skip


def imported(*arguments: str) -> tuple[dict[str, float], str]:
    """Cumulative seconds of every module that a Python process imports, and what it printed."""
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=True,
    )
    lines = re.findall(r"import time:\s+\d+ \|\s+(\d+) \|\s+(\S+)", done.stderr)
    return {name: int(micro) / 1e6 for micro, name in lines}, done.stdout


def test_importing_the_package_is_quick_and_light():
    seconds, _ = imported("-c", "import expunge")
    assert seconds["expunge"] < 1
    assert not HEAVY & set(seconds)


def test_naming_the_modules_of_methods_and_audits_stays_light():
    seconds, _ = imported("-c", "import expunge as xp; print(dir(xp.methods), dir(xp.audits))")
    assert not HEAVY & set(seconds)


def test_the_core_needs_no_transformers_and_no_scikit_learn():
    _, said = imported(
        "-c",
        "import sys; import expunge as xp; xp.Classification, xp.forget, xp.unlearn, xp.methods.SSD;"
        "print(*sorted({m.split('.')[0] for m in sys.modules}))",
    )
    loaded = set(said.split())
    assert "torch" in loaded
    assert not (HEAVY - {"torch", "numpy"}) & loaded


@pytest.mark.parametrize("arguments", [["--help"], ["unlearn", "--help"], ["--version"]])
def test_help_does_not_wait_for_torch(arguments):
    seconds, said = imported("-m", "expunge", *arguments)
    assert said
    assert not (HEAVY - {"typer"}) & set(seconds)


def test_every_public_name_loads():
    code = "import expunge as xp\nfor name in xp.__all__: getattr(xp, name)\nprint(len(xp.__all__))"
    _, said = imported("-c", code)
    assert int(said) > 20


def test_an_unknown_name_is_an_attribute_error():
    import expunge

    with pytest.raises(AttributeError, match="no attribute 'forgive'"):
        _ = expunge.forgive
    assert "forget" in dir(expunge)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", expunge.__version__)
