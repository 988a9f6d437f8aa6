"""Folder and settings of the Ray clusters that diptych starts."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipelines.storage.scratch import PREFIX, scratch_folder

# Ray's default folder has this name and is in the folder that the variable names.
_RAYS, _WHERE = "ray", "RAY_TMPDIR"

# The longest path of a Unix socket, and what Ray's sockets add to the path of the temporary folder.
_LONGEST = 107
_ADDED = f"/{PREFIX}12345678/{_RAYS}/session_2026-11-27_04-53-01_123456_4194304/sockets/plasma_store.99"
_ROOM = _LONGEST - len(_ADDED)


@contextmanager
def ray_folder() -> Iterator[str]:
    """A folder for Ray inside one that no other user can enter; both are removed at the end.

    If the block ends with an error, they stay until the next start, because of Ray's logs. Raises ValueError
    if no folder can be made.
    """
    with ExitStack() as stack:
        with _plain_errors():
            private = stack.enter_context(scratch_folder(_made_place(), keep_failed=True))
        yield os.path.join(private, _RAYS)


def lasting_ray_folder() -> str:
    """The same for a cluster that outlives this process; `remove_ray_folder` removes it."""
    with _plain_errors():
        return os.path.join(tempfile.mkdtemp(prefix=PREFIX, dir=_made_place()), _RAYS)


@contextmanager
def files_in(folder: str) -> Iterator[None]:
    """Make a cluster that starts within the block keep its files in `folder`, from `ray_folder`."""
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
    """Remove a folder of `lasting_ray_folder`; older versions had no private one around it."""
    private = Path(folder).parent
    shutil.rmtree(private if private.name.startswith(PREFIX) else folder, ignore_errors=True)


def rays_place() -> str:
    """RAY_TMPDIR or the system's temporary folder; /tmp if that path is too long for Ray's sockets."""
    wished = _wished_place()
    return "/tmp" if _is_too_long(wished) else wished


def _wished_place() -> str:
    with _plain_errors():
        return os.path.abspath(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())


def _is_too_long(place: str) -> bool:
    return len(os.fsencode(place)) > _ROOM


def _made_place() -> str:
    """Create `rays_place()`; say so if it is not the configured folder."""
    wished = _wished_place()
    if _is_too_long(wished):
        print(
            f"diptych: Ray's files are in /tmp: the path {wished} is too long for its sockets; "
            f"RAY_TMPDIR may have at most {_ROOM} bytes",
            file=sys.stderr,
        )
    os.makedirs(place := rays_place(), exist_ok=True)
    return place


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = os.path.dirname(error.filename) if error.filename else "the temporary folder"
        raise ValueError(
            f"cannot make a folder in {place}: {error.strerror}; set RAY_TMPDIR to one that you may write"
        ) from error


LOOPBACK = "127.0.0.1"

# Ray reads this when it is imported. It then uses the loopback address as the node's own, and listens only
# there.
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

# Ray reads these when it is imported. The first keeps it from repeating what a command's own lines say, such
# as "worker 1 failed"; the second keeps a thread whose cluster is gone from starting another.
AT_IMPORT = {
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed while executing a task",
    "RAY_ENABLE_AUTO_CONNECT": "0",
}

# With more processes than cores, Ray ends those that were idle for a second. Readers are idle between two
# windows, and starting one takes as long as reading some thousand images. Ray's nodes read this at their
# start.
IDLE_STAY = {"RAY_num_workers_soft_limit": "64"}


def wants_token(there: str) -> str:
    """Error message for a cluster that refused this process."""
    return (
        f"the Ray cluster at {there} requires its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH "
        "unless it is in ~/.ray/auth_token"
    )
