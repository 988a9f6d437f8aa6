"""A process that says how to resume where the command's own ends without a word, and ends its cluster.

Ray ends a driver whose cluster is lost, and a machine one that takes too much memory: neither says so.
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
    """Until the block ends, another process waits for the end of this one, and says on stderr how to resume.

    resume: the command's arguments for that. folder: where the cluster that this process has started has its
    files; what is left of it is ended. ray: where Ray is installed.
    """
    # Isolated: it starts in 20 ms, and Ctrl-C is not for it.
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
            with suppress(BrokenPipeError):  # Somebody has ended it.
                watchdog.communicate(_DONE)


def end_cluster(folder: str, ray: str) -> None:
    """End each process of Ray's and of this user's that has the folder in its command or a file of it open.

    Ray is installed in the folder `ray`.
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
    """Wait until the command's process has said that it is done, or has ended; in the latter case act."""
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as pipe:
        about = json.loads(pipe.readline() or "{}")
        if not about or _is_done(about["process"], pipe):
            return
    if folder := about["folder"]:
        end_cluster(folder, about["ray"])
    way_on = f"diptych {shlex.join(about['resume'])}" if about["resume"] else "the same command"
    print(
        "diptych: the process of this command has ended without a word: its Ray cluster was lost, or it was "
        f"killed; resume with: {way_on}",
        file=sys.stderr,
    )


def _is_done(process: int, pipe: RawIOBase) -> bool:
    """Whether the process, which has started this one, says so before it ends."""
    ended = False
    while not select.select([pipe], [], [], _LOOK_SECONDS)[0]:
        if ended:
            return False
        # A fork keeps the pipe open after the process's end, which its children see by their new parent.
        ended = os.getppid() != process
    return pipe.read(len(_DONE)) == _DONE.encode()


if __name__ == "__main__":
    _watch()
