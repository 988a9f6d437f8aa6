"""The `diptych` command as a process of its own."""

import os
import subprocess
import sys
from pathlib import Path


def diptych(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """What the command has printed, and its exit code; `environment` is added to this process's."""
    return subprocess.run(
        [sys.executable, "-m", "cluster", *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment,
        cwd=cwd, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
