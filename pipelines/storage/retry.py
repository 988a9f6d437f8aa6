"""Retry calls during storage outages, and explain the other storage errors in one line."""

import errno
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

# Default seconds of a storage outage after which a run gives up; see DIPTYCH_STORAGE_TIMEOUT.
_TIMEOUT_SECONDS = 120.0
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.25, 5.0

# A restarting server may deny requests for this long because it does not know its users yet. A denial may
# even be the first sign of an outage: clients themselves wait a little for a server that does not respond.
_RETURN_SECONDS = 5.0

# Buckets that this process has reached. A denial before that means wrong credentials and fails immediately.
_answered: set[str] = set()
_BUCKET = re.compile(r" (?:\w+://)?([\w.-]+)")

# The longest wait of a call within `briefly`, and whether this thread is within it.
_BRIEF_SECONDS = 1.0
_brief: ContextVar[bool] = ContextVar("brief", default=False)

# How often damaged content is read before it counts as damaged in the storage.
_READS = 3

# pyarrow's errors differ only in their text. These are the messages of pyarrow 26 when a server is stopped,
# resets or closes the connection, responds with 408, 429 or 5xx, or its name is not found. Bad certificates
# (curl's 60 and similar) and a full disk (507) are not transient.
_TRANSIENT = re.compile(
    r"AWS Error NETWORK_CONNECTION (?!.*curlCode: (?:1|3|51|58|60|77)\b)"
    r"|AWS Error (?:SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT)"
    r"|AWS Error UNKNOWN \(HTTP status (?:408|429|50[0234])\)"
    # The content was changed on the way.
    r"|XAmzContentSHA256Mismatch|XAmzContentChecksumMismatch|BadDigest|Response checksums mismatch"
    r"|google::cloud::Status\((?:UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED)"
    r"(?!.*CURL error \[(?:1|3|51|58|60|77)\])"
    r"|Azure Error: \[\w*\] (?:\D|408|429|50[0234])"
)
_NO_CREDENTIALS = re.compile(r"OAuth2 access token|Failed to get token from DefaultAzureCredential")
_NO_BUCKET = re.compile(
    r"NO_SUCH_BUCKET|ContainerNotFound|Bucket '.*' not found|NOT_FOUND.*function=CreateResumableUpload"
)
_DENIED = re.compile(
    r"AWS Error (?:ACCESS_DENIED|SIGNATURE_DOES_NOT_MATCH|INVALID_ACCESS_KEY_ID|UNRECOGNIZED_CLIENT)"
    r"|ExpiredToken|Status\((?:PERMISSION_DENIED|UNAUTHENTICATED)|Azure Error: \[\w*\] 40[13]"
)
# A HEAD response has no body that could tell an expired token from a wrong region.
_REFUSED = re.compile(r"HTTP status (?:301|400)\)")
_CLIENT = re.compile(
    r"AWS Error|google::cloud::Status|Azure Error:|DefaultAzureCredential|Bucket '.*' not found"
    r"|Path does not exist '"
)

# Environment variables with the credentials, by the client's name in error messages.
CREDENTIALS = {
    "AWS": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "google": "GOOGLE_APPLICATION_CREDENTIALS",
    "Azure": "AZURE_STORAGE_ACCOUNT and AZURE_STORAGE_KEY",
}


def retrying(call: Callable[[], _T], what: str) -> _T:
    """Return the result of `call`, calling it again during a storage outage.

    what: describes the call, as in "reading s3://b/key". `call` must be repeatable and open its files itself.
    Retries with growing waits for up to DIPTYCH_STORAGE_TIMEOUT seconds (120), with a warning at the start
    and one at the end; within `briefly`, for one second without warnings.
    Raises FileNotFoundError, PermissionError or OSError with one line that starts with `what` and gives the
    way out, immediately for errors that are not transient. Errors from elsewhere are raised unchanged.
    """
    started, waited, wait = time.monotonic(), False, _FIRST_WAIT_SECONDS
    denied: float | None = None
    bucket = found[1] if (found := _BUCKET.search(what)) else ""
    brief = _brief.get()
    chance = random.Random()  # Jitter, so that workers do not all retry at the same moment.
    while True:
        try:
            result = call()
        except (OSError, pa.ArrowException, ValueError) as error:
            now = time.monotonic()
            late = now - started > (min(_BRIEF_SECONDS, patience()) if brief else patience())
            denied = (denied or now) if _DENIED.search(str(error)) else None
            known = waited or bucket in _answered
            returning = known and not late and denied is not None and now - denied < _RETURN_SECONDS
            if not transient(error) and not returning:
                explained = _explained(error, what)
                if explained is None:
                    raise
                raise explained from error
            if late:
                raise OSError(_outage(error, what, brief)) from error
            if not waited and not brief:
                _log.warning("%s: waiting for the storage (%s)", what, first_line(error))
        else:
            if waited and not brief:
                _log.warning("%s: the storage is back after %.0f s", what, time.monotonic() - started)
            _answered.add(bucket)
            return result
        waited = True
        time.sleep(wait * chance.uniform(0.5, 1))
        wait = min(2 * wait, _LONGEST_WAIT_SECONDS)


@contextmanager
def briefly() -> Iterator[None]:
    """Within the block, calls of this thread wait at most a second during a storage outage.

    For callers that retry themselves: the waits of several calls would add up.
    """
    token = _brief.set(True)
    try:
        yield
    finally:
        _brief.reset(token)


def _outage(error: Exception, what: str, brief: bool) -> str:
    if brief:
        return f"{what}: the storage is unavailable ({first_line(error)})"
    return (
        f"{what}: the storage was unavailable for {patience():g} s ({first_line(error)}); check it and the "
        "network, or set DIPTYCH_STORAGE_TIMEOUT to more seconds"
    )


def reading_again(call: Callable[[], _T], what: str, damage: Callable[[Exception], bool]) -> _T:
    """Return the result of `call`, calling it up to three times if it raises an error that `damage` accepts.

    Reading again helps if bits have flipped on the way, not if the stored file is damaged.
    """
    for reads in range(1, _READS + 1):
        try:
            result = call()
        except Exception as error:
            if reads == _READS or not damage(error):
                raise
        else:
            if reads > 1:
                _log.warning("%s: it arrived damaged, but intact when read again", what)
            return result
    raise AssertionError("the last read returns or raises")


def transient(error: BaseException) -> bool:
    """Whether the error may pass by itself: the server is unavailable or overloaded, and did not refuse."""
    text = str(error)
    if _NO_CREDENTIALS.search(text):
        # With a key file only the network can be the cause; without one, credentials are missing.
        return "OAuth2" in text and "GOOGLE_APPLICATION_CREDENTIALS" in os.environ
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if type(error) is ValueError:
        # pyarrow's whole message when the first read of an open GCS object fails.
        return text == "I/O operation on closed file"
    return isinstance(error, (OSError, pa.ArrowException)) and _TRANSIENT.search(text) is not None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without the details that storage clients add."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.partition(" error_info={")[0]


def _explained(error: Exception, what: str) -> OSError | None:
    """The error in one line with the way out, or None if it is not a known error of a storage client."""
    text = str(error)
    if not _CLIENT.search(text):
        if isinstance(error, PermissionError):
            return PermissionError(f"{what}: {first_line(error)}; give this user the permission")
        return None
    variables = next((names for client, names in CREDENTIALS.items() if client in text), "the credentials")
    if _NO_CREDENTIALS.search(text):
        return PermissionError(f"{what}: no credentials were found; set {variables}")
    if _NO_BUCKET.search(text):
        return FileNotFoundError(f"{what}: the bucket does not exist; create it or check the spelling")
    if "ExpiredToken" in text:
        return PermissionError(
            f"{what}: the credentials have expired; set fresh AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
            "AWS_SESSION_TOKEN"
        )
    if _DENIED.search(text):
        return PermissionError(f"{what}: access was denied; check {variables}")
    if _REFUSED.search(text):
        return OSError(
            f"{what}: the request was refused ({first_line(error)}); check AWS_DEFAULT_REGION, which must be "
            "the bucket's, and whether AWS_SESSION_TOKEN has expired"
        )
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{what}: the file does not exist")
    return OSError(f"{what}: {first_line(error)}")


def patience() -> float:
    """Seconds to wait during a storage outage or while writes fail. Raises ValueError if not a number."""
    value = os.environ.get("DIPTYCH_STORAGE_TIMEOUT", _TIMEOUT_SECONDS)
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"DIPTYCH_STORAGE_TIMEOUT={value} is not a number of seconds; try 120") from None


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
    """The way out for a failed write, as a command to the user."""
    if error.errno == errno.ENOSPC:
        return "delete small files there" if _no_inodes(error.filename) else "free space there"
    return _WAYS_OUT.get(error.errno or 0, "check the storage")


def _no_inodes(path: str | None) -> bool:
    """Whether the file system at `path` has no inodes left, although it may have space."""
    if path is None:
        return False
    place = next((parent for parent in Path(path).parents if parent.is_dir()), None)
    if place is None:
        return False
    found = os.statvfs(place)
    return found.f_files > 0 and found.f_favail == 0
