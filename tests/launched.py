"""Run a script once in one process and once in two gloo processes side by side."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TWO = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0",
       "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0")  # fmt: skip


def in_one_and_two(script: str, root: Path, seconds: int = 120) -> dict[int, Path]:
    """Run both at once; each is given a folder of its own as its argument.

    Returns:
        The folders, by the number of processes.
    """
    (root / "script.py").write_text(script)
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    running = {}
    for count, launch in ((1, ()), (2, TWO)):
        folder = root / str(count)
        folder.mkdir()
        command = [sys.executable, *launch, str(root / "script.py"), str(folder)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        running[count] = folder, subprocess.Popen(command, env=environment, text=True, **pipes)
    folders = {}
    for count, (folder, process) in running.items():
        said, _ = process.communicate(timeout=seconds)
        assert process.returncode == 0, said[-3000:]
        folders[count] = folder
    return folders
