"""Storage faults: which pass by themselves, how long they are waited for, and the way out of the others."""

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

# Seconds that a storage may be away before a run gives up; DIPTYCH_STORAGE_TIMEOUT in the environment
# sets another number.
_TIMEOUT_SECONDS = 120.0
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.25, 5.0

# A server that comes back may not know its users for so long. The first that is heard of its absence can be
# that it denies a request: the client itself waits a little for one that does not answer.
_RETURN_SECONDS = 5.0

# Buckets that this process has had an answer of: a denial before that is wrong credentials, and told at once.
_answered: set[str] = set()
_BUCKET = re.compile(r" (?:\w+://)?([\w.-]+)")

# How long a call waits at most within `briefly`, and whether this thread is.
_BRIEF_SECONDS = 1.0
_brief: ContextVar[bool] = ContextVar("brief", default=False)

# How often what arrives damaged is read before it counts as damaged.
_READS = 3

# pyarrow tells faults apart by their text alone, so this is what pyarrow 26 says when a server is stopped,
# resets, breaks off, answers 408, 429 or 5xx, or its name is not found. Certificates (curl's 60 and its
# kin) and a full disk (507) do not mend themselves.
_TRANSIENT = re.compile(
    r"AWS Error NETWORK_CONNECTION (?!.*curlCode: (?:1|3|51|58|60|77)\b)"
    r"|AWS Error (?:SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT)"
    r"|AWS Error UNKNOWN \(HTTP status (?:408|429|50[0234])\)"
    # What came over the network is not what was sent.
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
# A HEAD request's answer has no body to tell an expired token from a wrong region.
_REFUSED = re.compile(r"HTTP status (?:301|400)\)")
_CLIENT = re.compile(
    r"AWS Error|google::cloud::Status|Azure Error:|DefaultAzureCredential|Bucket '.*' not found"
    r"|Path does not exist '"
)

# The environment's variables that hold the credentials of the client whose name stands in a message.
CREDENTIALS = {
    "AWS": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "google": "GOOGLE_APPLICATION_CREDENTIALS",
    "Azure": "AZURE_STORAGE_ACCOUNT and AZURE_STORAGE_KEY",
}


def retrying(call: Callable[[], _T], what: str) -> _T:
    """What `call` returns, tried again while the storage is away; `what` says it, as in "reading s3://b/key".

    `call` must do the same when called twice, and open anew whatever it reads. Waits up to
    DIPTYCH_STORAGE_TIMEOUT seconds (120), ever longer, with one warning at the start and one at the end; a
    second and without a word within `briefly`.
    Raises FileNotFoundError, PermissionError or OSError with one line that opens with `what` and says the way
    out, at once for faults that do not pass; errors that are not the storage's go through as they are.
    """
    started, waited, wait = time.monotonic(), False, _FIRST_WAIT_SECONDS
    denied: float | None = None
    bucket = found[1] if (found := _BUCKET.search(what)) else ""
    brief = _brief.get()
    chance = random.Random()  # Workers that lost the storage together must not come back together.
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
                raise OSError(_away(error, what, brief)) from error
            if not waited and not brief:
                _log.warning("%s: waiting for the storage (%s)", what, first_line(error))
        else:
            if waited and not brief:
                _log.warning("%s: goes on after %.0f s", what, time.monotonic() - started)
            _answered.add(bucket)
            return result
        waited = True
        time.sleep(wait * chance.uniform(0.5, 1))
        wait = min(2 * wait, _LONGEST_WAIT_SECONDS)


@contextmanager
def briefly() -> Iterator[None]:
    """Calls of this thread wait a second at most for a storage that is away until the block ends.

    For callers that try again by themselves: the waits of several calls in a row would add up.
    """
    token = _brief.set(True)
    try:
        yield
    finally:
        _brief.reset(token)


def _away(error: Exception, what: str, brief: bool) -> str:
    if brief:
        return f"{what}: the storage is away ({first_line(error)})"
    return (
        f"{what}: the storage was away for {patience():g} s ({first_line(error)}); check it and the network, "
        "or set DIPTYCH_STORAGE_TIMEOUT to more seconds"
    )


def reading_again(call: Callable[[], _T], what: str, damage: Callable[[Exception], bool]) -> _T:
    """What `call` returns, called up to three times while it raises an error that `damage` takes for one.

    Bits that have flipped on the way come right when they are read again; others are damaged where they lie.
    """
    for reads in range(1, _READS + 1):
        try:
            result = call()
        except Exception as error:
            if reads == _READS or not damage(error):
                raise
        else:
            if reads > 1:
                _log.warning("%s: it arrived damaged, and whole when it was read again", what)
            return result
    raise AssertionError("the last read returns or raises")


def transient(error: BaseException) -> bool:
    """Whether the fault may pass by itself: a server that is away or overloaded, not one that says no."""
    text = str(error)
    if _NO_CREDENTIALS.search(text):
        # With a key file only the network can be at fault; without one there is nobody to ask for a token.
        return "OAuth2" in text and "GOOGLE_APPLICATION_CREDENTIALS" in os.environ
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if type(error) is ValueError:
        # All that pyarrow says when the first read of an open GCS object fails.
        return text == "I/O operation on closed file"
    return isinstance(error, (OSError, pa.ArrowException)) and _TRANSIENT.search(text) is not None


def first_line(error: BaseException) -> str:
    """An error's message without the pages that storage clients add to it."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.partition(" error_info={")[0]


def _explained(error: Exception, what: str) -> OSError | None:
    """The error in one line with its way out, or None where it is no storage client's and none is known."""
    text = str(error)
    if not _CLIENT.search(text):
        if isinstance(error, PermissionError):
            return PermissionError(f"{what}: {first_line(error)}; give this user the permission")
        return None
    variables = next((names for client, names in CREDENTIALS.items() if client in text), "the credentials")
    if _NO_CREDENTIALS.search(text):
        return PermissionError(f"{what}: no credentials were found; set {variables}")
    if _NO_BUCKET.search(text):
        return FileNotFoundError(f"{what}: the bucket does not exist; create it or mend its name")
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
        return FileNotFoundError(f"{what}: there is no such file")
    return OSError(f"{what}: {first_line(error)}")


def patience() -> float:
    """Seconds that a storage may be away, or take no writes; ValueError where they are no number."""
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
