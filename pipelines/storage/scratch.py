"""Temporary folders of a process, removed when it ends or, if it was killed, by a later process."""

import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "diptych-"

# The lock file is locked while the folder's owner lives; the kernel releases the lock however the process
# ends. It contains the names of the owner's machine, at most _MOST bytes.
_LOCK, _MOST = ".owner", 1000


@contextmanager
def scratch_folder(within: str | None = None, *, keep_failed: bool = False) -> Iterator[str]:
    """A new private folder in `within` (unset: the system's temporary folder), removed at the end.

    With `keep_failed` it stays after an error, which its files may explain, until the next call with the same
    `within`. Every call also removes the folders of this user's killed processes. Raises OSError if the
    folder cannot be made.
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
            with suppress(OSError):  # Already removed.
                _remove(folder)
        os.close(lock)


def _lock(folder: str) -> int:
    """Mark the folder as owned by this process; returns the descriptor that holds the lock."""
    # Under another name until it is locked: a free lock means that the owner is dead.
    unnamed = os.path.join(folder, f"{_LOCK}-")
    lock = os.open(unnamed, os.O_CREAT | os.O_RDWR, 0o600)
    with suppress(OSError):  # On a file system without locks, only this process removes the folder.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(lock, " ".join(_machine()).encode())
        os.rename(unnamed, os.path.join(folder, _LOCK))
    return lock


def _machine() -> set[str]:
    """The host name, which differs between containers, and Linux's boot id, which changes at each start."""
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
                with suppress(OSError):  # No lock, or the owner is alive, perhaps on another machine.
                    _remove_unlocked(entry.path)


def _remove_unlocked(folder: str) -> None:
    lock = os.open(os.path.join(folder, _LOCK), os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A shared file system may not share its locks: remove only this machine's folders.
        if _machine() & set(os.read(lock, _MOST).decode().split()):
            _remove(folder)
    finally:
        os.close(lock)


def _remove(folder: str) -> None:
    """Remove the folder. If others still write to it, its lock stays, so that a later call retries."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name != _LOCK:
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):  # A folder, removed above.
                os.unlink(path)
    if set(os.listdir(folder)) <= {_LOCK}:
        shutil.rmtree(folder, ignore_errors=True)
