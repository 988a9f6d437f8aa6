"""The way out of a write that this machine's file system refused."""

import errno
import os
from pathlib import Path

_WAYS_OUT = {
    errno.EDQUOT: "delete files of this user, or have the quota raised",
    errno.EROFS: "mount it so that it can be written",
    errno.EACCES: "give this user the permission",
    errno.EPERM: "give this user the permission",
    errno.EMFILE: "raise the limit of open files, as in ulimit -n 4096",
    errno.ENFILE: "close other programs: this machine can open no more files",
    errno.ENOENT: "bring it back, or mount its disk again",
    errno.EIO: "check the disk",
}


def way_out(error: OSError) -> str:
    """What to do about a write that failed, as a command to the user."""
    if error.errno == errno.ENOSPC:
        return "delete small files there" if _no_inodes(error.filename) else "free space there"
    return _WAYS_OUT.get(error.errno or 0, "check the storage")


def _no_inodes(path: str | None) -> bool:
    """Whether the file system at `path` has room for no further file, though perhaps for bytes."""
    if path is None:
        return False
    place = next((parent for parent in Path(path).parents if parent.is_dir()), None)
    if place is None:
        return False
    found = os.statvfs(place)
    return found.f_files > 0 and found.f_favail == 0
