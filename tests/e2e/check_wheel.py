"""Build the wheel and see that it holds what a user needs, and that its five lines run.

The environment that runs this has the dependencies; the wheel is unpacked apart from it, so that
nothing of the checkout can stand in for something the wheel lacks.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINES = """
import expunge as xp
assert xp.__file__.startswith({where!r}), xp.__file__
problem = xp.workloads.registry.get("digits-class").problem()
request = xp.forget(label=3)
outcome = xp.unlearn(problem, request, xp.methods.SSD())
findings = xp.audit(outcome, "standard", references=2)
outcome.save("no-threes")
assert xp.load("no-threes").record["weights"] == outcome.record["weights"]
comparison = xp.compare(problem, request, ["retrain", "finetune", "ssd"], seeds=[0, 1], references=2)
assert len(comparison.rows) == 2 + 2 * 2
assert comparison.report("page").exists()
print(comparison)
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        subprocess.run(
            [
                sys.executable,
                "-m",
                "build",
                "--wheel",
                "--no-isolation",
                "--outdir",
                folder,
                str(ROOT),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (wheel,) = place.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            archive.extractall(place / "site")
        for part in ("store/migrations/", "report/templates/", "py.typed"):
            assert any(part in name for name in names), f"the wheel lacks {part}"
        site = str(place / "site")
        subprocess.run(
            [
                sys.executable,
                "-W",
                "error::DeprecationWarning:expunge",
                "-c",
                LINES.format(where=site),
            ],
            check=True,
            cwd=place,
            env={"PYTHONPATH": site, "PATH": "/usr/bin:/bin", "HOME": folder},
        )
    print("the wheel works")


if __name__ == "__main__":
    main()
