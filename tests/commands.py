"""The `diptych` command as a process of its own, and a cluster that it starts."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def diptych(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """What the command has printed, and its exit code; `environment` is added to this process's."""
    return subprocess.run(
        [sys.executable, "-m", "cluster", *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment,
        cwd=cwd, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@contextmanager
def started_cluster(folder: Path, *, nodes: int, **environment: str) -> Iterator[dict[str, str]]:
    """What `diptych cluster up` notes of nodes with 2 CPUs each; commands find it, as `folder` has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        started = diptych("cluster", "up", "--nodes", str(nodes), "--cpus", "2", **environment)
        assert started.returncode == 0, started.stderr
        yield json.loads((folder / "diptych" / "cluster.json").read_text())
        diptych("cluster", "down")
