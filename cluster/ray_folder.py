"""The folder and the settings of the Ray clusters that diptych starts."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipelines.storage.scratch import PREFIX, scratch_folder

# Ray's default folder is the one of this name in that of the variable.
_RAYS, _WHERE = "ray", "RAY_TMPDIR"

# The longest path of a Unix socket, and what Ray's add to the place of a new folder.
_LONGEST = 107
_ADDED = f"/{PREFIX}12345678/{_RAYS}/session_2026-11-27_04-53-01_123456_4194304/sockets/plasma_store.99"
_ROOM = _LONGEST - len(_ADDED)


@contextmanager
def ray_folder() -> Iterator[str]:
    """A folder for Ray, below one that no other user can enter; both are removed at the end.

    They stay where the block ends with an error, for Ray's logs, until the next start. Raises ValueError
    where no folder can be made.
    """
    with ExitStack() as stack:
        with _told():
            private = stack.enter_context(scratch_folder(_made_place(), keep_failed=True))
        yield os.path.join(private, _RAYS)


def lasting_ray_folder() -> str:
    """Likewise for a cluster that outlives this process, which removes it by remove_ray_folder."""
    with _told():
        return os.path.join(tempfile.mkdtemp(prefix=PREFIX, dir=_made_place()), _RAYS)


@contextmanager
def files_in(folder: str) -> Iterator[None]:
    """Have a cluster that is started within the block keep its files in the folder, which is ray_folder's."""
    before = os.environ.get(_WHERE)
    os.environ[_WHERE] = os.path.dirname(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WHERE]
        else:
            os.environ[_WHERE] = before


def remove_ray_folder(folder: str) -> None:
    """Remove what lasting_ray_folder has made; an older diptych had its folder open."""
    private = Path(folder).parent
    shutil.rmtree(private if private.name.startswith(PREFIX) else folder, ignore_errors=True)


def rays_place() -> str:
    """RAY_TMPDIR or the system's temporary folder; /tmp where Ray's sockets' paths are too long for those."""
    wished = _wished_place()
    return "/tmp" if _is_too_long(wished) else wished


def _wished_place() -> str:
    with _told():
        return os.path.abspath(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())


def _is_too_long(place: str) -> bool:
    return len(os.fsencode(place)) > _ROOM


def _made_place() -> str:
    """The same, which is there; says so where it is not what was wished for."""
    wished = _wished_place()
    if _is_too_long(wished):
        print(
            f"diptych: Ray's files are in /tmp: the path {wished} is too long for its sockets; "
            f"RAY_TMPDIR may have {_ROOM} bytes",
            file=sys.stderr,
        )
    os.makedirs(place := rays_place(), exist_ok=True)
    return place


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = os.path.dirname(error.filename) if error.filename else "the temporary folder"
        raise ValueError(
            f"cannot make a folder in {place}: {error.strerror}; set RAY_TMPDIR to one of this user's"
        ) from error


LOOPBACK = "127.0.0.1"

# Ray reads this as it is imported: then it takes the loopback address for a node's own, and listens there
# alone.
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

# Ray reads these as it is imported. It is not to print among a command's lines what they say already, as
# "worker 1 failed"; and a thread that does not know yet that its cluster is gone is not to start another.
AT_IMPORT = {
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed while executing a task",
    "RAY_ENABLE_AUTO_CONNECT": "0",
}

# Ray ends processes that were idle for a second where there are more than cores. The readers are, between
# two windows, and starting one takes as long as it reads some thousand images. Ray's nodes read this as they
# start.
IDLE_STAY = {"RAY_num_workers_soft_limit": "64"}


def wants_token(there: str) -> str:
    """What a user is told whom a cluster has turned away."""
    return (
        f"the Ray cluster at {there} wants its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH "
        "unless it is in ~/.ray/auth_token"
    )
