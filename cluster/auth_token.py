"""Ray's authentication token: who has it can run code as this user, and Ray makes it readable by all."""

import fcntl
import os
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def ensure_token() -> None:
    """Make the token if there is none. If others can read it, make it private and say so on stderr.

    A token that RAY_AUTH_TOKEN_PATH names is left as it is. Raises ValueError if that file has none, or the
    token cannot be written.
    """
    path = token_file()
    if path is None:
        return
    if not _has_token(path):
        if path != _default():
            raise ValueError(f"RAY_AUTH_TOKEN_PATH={path} has no token; unset it, or write one there")
        _make(path)
    elif open_to_others():
        _close(path)


def token_file() -> Path | None:
    """Path from which Ray reads the token; None if RAY_AUTH_TOKEN is the token itself."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(named) if named else _default()


def open_to_others() -> str | None:
    """The token's file and mode if other users of this machine can read or replace it, else None."""
    path = token_file()
    with suppress(OSError):  # There is none.
        if path:
            mode, folder = path.stat().st_mode, path.parent.stat().st_mode
            if mode & 0o077:
                return f"{path} has mode {stat.S_IMODE(mode):04o}"
            if folder & 0o022 and not folder & stat.S_ISVTX:
                return f"{path.parent} has mode {stat.S_IMODE(folder):04o}"
    return None


def _default() -> Path:
    return Path.home() / ".ray" / "auth_token"


def _has_token(path: Path) -> bool:
    """Whether Ray would find a token; it takes an empty file for none."""
    try:
        return bool(path.read_text().strip())
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ValueError(_not_usable(path, error)) from error


def _make(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.parent.chmod(0o700)
        with _only_one(path.parent):
            if not _has_token(path):  # Another process may have made one in the meantime.
                _write(path, secrets.token_hex(32))
    except OSError as error:
        raise ValueError(_not_usable(path, error)) from error


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Let one process at a time enter with the same folder."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # A file system without locks.
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _write(path: Path, token: str) -> None:
    """Write the file whole, with mode 0600."""
    descriptor, part = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "w") as file:
        file.write(token)
    os.replace(part, path)


def _close(path: Path) -> None:
    was = open_to_others()
    if path != _default():
        # It may be shared with a group, on purpose.
        _say(f"{was}: other users of this machine can read Ray's token, and use this user's clusters")
        return
    try:
        path.chmod(0o600)
        path.parent.chmod(0o700)
    except OSError as error:
        _say(f"{was}, which {error.strerror}: other users of this machine can use this user's clusters")
    else:
        _say(
            f"{was}: other users of this machine could read Ray's token; now they cannot. To replace it, "
            "delete it while no cluster runs"
        )


def _not_usable(path: Path, error: OSError) -> str:
    return f"cannot use {path}: {error.strerror}; set RAY_AUTH_TOKEN_PATH to a file with a token"


def _say(line: str) -> None:
    print(f"diptych: {line}", file=sys.stderr)
