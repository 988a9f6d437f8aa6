"""The processes of Ray Train's workers on this machine, and keeping processes from going on."""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def training_workers() -> dict[int, int]:
    """Each worker's process with the one that has started it: its node's raylet."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::RayTrainWorker"):
                found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # It has ended.
            continue
    return found


@contextmanager
def held(processes: Iterable[int]) -> Iterator[None]:
    """Stop them: a quick machine would end a run before what happens to it is seen."""
    stopped = list(processes)
    for one in stopped:
        os.kill(one, signal.SIGSTOP)
    try:
        yield
    finally:
        for one in stopped:
            os.kill(one, signal.SIGCONT)
