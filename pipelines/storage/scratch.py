"""Folders for the files of one process: removed at its end, or by a later one where it was killed."""

import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "diptych-"

# Locked for as long as the folder's owner lives; the kernel lets go of it, however the process ends.
# It has the names of the owner's machine.
_LOCK, _MOST = ".owner", 1000


@contextmanager
def scratch_folder(within: str | None = None, *, keep_failed: bool = False) -> Iterator[str]:
    """A new folder in `within`, unset: the system's temporary folder, that no other user can enter.

    It is removed at the end. With `keep_failed` it stays where the block ends with an error, which its files
    may explain, until the next call with the same `within`. That removes the folders of this user's processes
    that were killed, too. Raises OSError where no folder can be made.
    """
    within = within or tempfile.gettempdir()
    _remove_abandoned(within)
    folder = tempfile.mkdtemp(prefix=PREFIX, dir=within)
    lock, kept = _lock(folder), False
    try:
        yield folder
    except Exception:
        kept = keep_failed
        raise
    finally:
        if not kept:
            with suppress(OSError):  # Someone else has removed it.
                _remove(folder)
        os.close(lock)


def _lock(folder: str) -> int:
    """Mark the folder as this process's; the descriptor that holds the lock."""
    # Under another name until it is locked: a lock that is free says that the owner is dead.
    unnamed = os.path.join(folder, f"{_LOCK}-")
    lock = os.open(unnamed, os.O_CREAT | os.O_RDWR, 0o600)
    with suppress(OSError):  # A file system without locks: nobody removes the folder but this process.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(lock, " ".join(_machine()).encode())
        os.rename(unnamed, os.path.join(folder, _LOCK))
    return lock


def _machine() -> set[str]:
    """Its name, which a container has of its own, and Linux's of this start, which the next one changes."""
    names = {socket.gethostname()}
    with suppress(OSError):  # Not on Linux.
        names.add(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    return names


def _remove_abandoned(within: str) -> None:
    """Remove this user's folders whose owners are dead."""
    with suppress(OSError), os.scandir(within) as entries:
        for entry in entries:
            ours = entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False)
            if ours and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                with suppress(OSError):  # It has no lock, or its owner lives, or may elsewhere.
                    _remove_unlocked(entry.path)


def _remove_unlocked(folder: str) -> None:
    lock = os.open(os.path.join(folder, _LOCK), os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A file system that machines share may keep each one's locks to itself.
        if _machine() & set(os.read(lock, _MOST).decode().split()):
            _remove(folder)
    finally:
        os.close(lock)


def _remove(folder: str) -> None:
    """Remove the folder; one that others still write to keeps its lock, so that a later call tries again."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name != _LOCK:
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):  # It was a folder.
                os.unlink(path)
    if set(os.listdir(folder)) <= {_LOCK}:
        shutil.rmtree(folder, ignore_errors=True)
