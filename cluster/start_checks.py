"""Check that Ray can start and run here: the limit of open files, and free space for Ray's files."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from cluster.ray_folder import rays_place

# Ray's processes inherit the limit. With one worker, one process has 81 files open; each node and worker adds
# some. Linux's default is 1,024.
_OPEN_FILES, _WISHED_OPEN_FILES = 1024, 65536

# For Ray's logs, a megabyte in a small run, and for what does not fit into its object store.
_ROOM_BYTES, _ROOM_FILES = 16 * 2**20, 500

_LOOK_SECONDS = 10.0


@contextmanager
def checked_start() -> Iterator[None]:
    """Check before the block, which starts a Ray cluster, and again if that fails. Raises ValueError."""
    check_start()
    try:
        yield
    except Exception:
        check_start()  # This may be the reason.
        raise


def check_start() -> None:
    """Raise the limit of open files. Raises ValueError if it stays too low, or Ray's files have no room."""
    raise_open_files()
    check_room(rays_place())


@contextmanager
def watched_room(warn: Callable[[str], None], look_seconds: float = _LOOK_SECONDS) -> Iterator[None]:
    """Until the block ends, warn each time that Ray's folder fills up.

    Ray would restart the processes that read images again and again, without an error, and a run would stall.
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
                    warn(f"{error}: until then, a run may stall")
                full = True

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def raise_open_files() -> None:
    """Raise the soft limit of open files as far as useful. Raises ValueError if it is still too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wished = _WISHED_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _WISHED_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wished:
        soft = wished
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        raise ValueError(
            f"this process may open {soft} files, and a Ray cluster needs {_OPEN_FILES:,}: run "
            f"ulimit -n {_OPEN_FILES} in a new shell, or ask for a higher hard limit"
        )


def check_room(place: str) -> None:
    """Raises ValueError if the file system at `place` has too few bytes or files left."""
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
