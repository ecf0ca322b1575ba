"""README.md: its Python blocks run as they stand, each in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
# what each block leaves behind
FILES = [
    {
        "no-threes/change.safetensors",
        "no-threes/record.json",
        "report/report.html",
        "report/report.json",
        "report/report.md",
    },
    {"forgot.pt"},
]


@pytest.mark.parametrize(("block", "files"), list(zip(BLOCKS, FILES, strict=True)))
def test_block(block, files, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "EXPUNGE_STORE": str(tmp_path / "no store")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert re.search(r"accuracy/forget-train [01]\.\d+ retrained: [01]\.\d+", done.stdout)
    made = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert made == files
