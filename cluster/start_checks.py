"""What this machine must have for a Ray cluster to start, and to work: open files, and room for Ray's own."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from cluster.ray_folder import rays_place

# Each of Ray's processes inherits the limit. With one worker the one that has most has 81 open, and more with
# each node and worker; 1,024 is what Linux comes with.
_OPEN_FILES, _WISHED_OPEN_FILES = 1024, 65536

# Ray's logs, a megabyte for a small run, and what does not fit into its object store.
_ROOM_BYTES, _ROOM_FILES = 16 * 2**20, 500

_LOOK_SECONDS = 10.0


@contextmanager
def checked_start() -> Iterator[None]:
    """Check before the block starts a Ray cluster and, where that fails, once more; raises ValueError."""
    check_start()
    try:
        yield
    except Exception:
        check_start()  # It may have failed because of that.
        raise


def check_start() -> None:
    """Raise the limit of open files; ValueError where it stays low, or Ray's files have no room."""
    raise_open_files()
    check_room(rays_place())


@contextmanager
def watched_room(warn: Callable[[str], None], look_seconds: float = _LOOK_SECONDS) -> Iterator[None]:
    """Warn, once each time, of Ray's folder having filled up until the block ends.

    Ray then starts the processes that read the images over and over, without a word: a run stands still.
    """
    ended = Event()

    def watch() -> None:
        full = False
        while not ended.wait(look_seconds):
            try:
                check_room(rays_place())
                full = False
            except ValueError as error:
                if not full:
                    warn(f"{error}: without room there, a run may stand still")
                full = True

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def raise_open_files() -> None:
    """Let this process and those it starts open as many files as it may; ValueError where those are few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wished = _WISHED_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _WISHED_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wished:
        soft = wished
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        raise ValueError(
            f"this process may open {soft} files, and a Ray cluster needs {_OPEN_FILES:,}: run "
            f"ulimit -n {_OPEN_FILES} in a new shell, or have the hard limit raised"
        )


def check_room(place: str) -> None:
    """ValueError where the file system at `place` is all but full, of bytes or of files."""
    there = next(
        (folder for folder in (Path(place), *Path(place).absolute().parents) if folder.is_dir()), "/"
    )
    found = os.statvfs(there)
    free = found.f_bavail * found.f_frsize
    if free < _ROOM_BYTES:
        lacks = f"has {free / 2**20:.0f} MiB free, and needs {_ROOM_BYTES / 2**20:.0f}"
    elif found.f_files > 0 and found.f_favail < _ROOM_FILES:
        lacks = f"has room for {found.f_favail} files, and needs it for {_ROOM_FILES:,}"
    else:
        return
    raise ValueError(f"Ray's temporary folder in {place} {lacks}; free space there, or set RAY_TMPDIR")
