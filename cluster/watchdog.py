"""A process that prints how to resume if the command's process dies without an error, and ends its cluster.

Ray ends a driver whose cluster is lost, and the kernel one that takes too much memory; neither prints why.
"""

import json
import os
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import RawIOBase
from pathlib import Path

_DONE = "done"

_LOOK_SECONDS = 0.2


@contextmanager
def watched(resume: Sequence[str], folder: str | None, ray: str) -> Iterator[None]:
    """Until the block ends, another process watches this one; if this one dies, it prints how to resume.

    resume: arguments of the command to resume with. folder: the folder of a cluster that this process
    started, of which the watchdog ends the rest. ray: the folder in which Ray is installed.
    """
    # Isolated, so that it starts in 20 ms; in a session of its own, so that Ctrl-C does not reach it.
    watchdog = subprocess.Popen(
        [sys.executable, "-IS", __file__], stdin=subprocess.PIPE, text=True, start_new_session=True
    )
    assert watchdog.stdin
    process = os.getpid()
    about = {"resume": list(resume), "folder": folder, "ray": ray, "process": process}
    print(json.dumps(about), file=watchdog.stdin, flush=True)
    try:
        yield
    finally:
        if os.getpid() == process:  # A fork leaves the block too.
            with suppress(BrokenPipeError):  # The watchdog was killed.
                watchdog.communicate(_DONE)


def end_cluster(folder: str, ray: str) -> None:
    """Kill this user's Ray processes that have `folder` in their command line or a file of it open.

    `ray` is the folder in which Ray is installed.
    """
    for place in Path("/proc").glob("[0-9]*"):
        process = int(place.name)
        with suppress(OSError):  # It has ended.
            if process != os.getpid() and _is_of(place, folder, ray):
                os.kill(process, signal.SIGKILL)


def _is_of(place: Path, folder: str, ray: str) -> bool:
    command = (place / "cmdline").read_bytes()
    rays = command.startswith(b"ray::") or ray.encode() in command
    own = place.stat().st_uid == os.getuid()
    return rays and own and (folder.encode() in command or _has(place, folder))


def _has(place: Path, folder: str) -> bool:
    """Whether the process has a file of the folder open."""
    for link in (place / "fd").iterdir():
        with suppress(OSError):  # It was closed.
            if folder in os.readlink(link):
                return True
    return False


def _watch() -> None:
    """Wait until the command's process says that it is done; if it ends before, print how to resume."""
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as pipe:
        about = json.loads(pipe.readline() or "{}")
        if not about or _is_done(about["process"], pipe):
            return
    if folder := about["folder"]:
        end_cluster(folder, about["ray"])
    command = f"diptych {shlex.join(about['resume'])}" if about["resume"] else "the same command"
    print(
        "diptych: the process of this command ended without an error: its Ray cluster was lost, or it was "
        f"killed; resume with: {command}",
        file=sys.stderr,
    )


def _is_done(process: int, pipe: RawIOBase) -> bool:
    """Whether `process`, which started this one, says that it is done before it ends."""
    ended = False
    while not select.select([pipe], [], [], _LOOK_SECONDS)[0]:
        if ended:
            return False
        # A fork keeps the pipe open after the process's end, so look at the parent too: it changes then.
        ended = os.getppid() != process
    return pipe.read(len(_DONE)) == _DONE.encode()


if __name__ == "__main__":
    _watch()
