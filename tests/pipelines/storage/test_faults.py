"""Transient faults are retried; others fail immediately, in one line with the way out."""

import logging
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from threading import Thread

import pyarrow as pa
import pytest
from objectstores import free_port
from pyarrow import fs

from pipelines import storage
from pipelines.storage.retry import first_line, retrying, transient

Answer = Callable[..., None]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answer]:
    """answer(status, code): S3 and GCS answer every request with that HTTP status and S3 error code."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    monkeypatch.setenv("DIPTYCH_STORAGE_TIMEOUT", "0")

    def set_answer(status: int, code: str = "", message: str = "") -> None:
        _Refusing.status = status
        _Refusing.body = (
            f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode() if code else b""
        )

    yield set_answer
    server.shutdown()
    server.server_close()
    thread.join()


class _Refusing(BaseHTTPRequestHandler):
    status, body = 500, b""
    protocol_version = "HTTP/1.1"  # Clients ask before they send, and would wait a second for HTTP/1.0.

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.status == 0:
            self.close_connection = True  # Without a word, as a server that is killed.
            return
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self.body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output clean."""


OPERATIONS = {
    "reading": lambda uri: storage.read(f"{uri}/key"),
    "writing": lambda uri: storage.write(f"{uri}/key", b"content"),
    "listing": storage.names,
    "deleting": lambda uri: storage.remove(f"{uri}/key"),
}


@pytest.mark.parametrize(
    ("operation", "status", "code"),
    [
        ("reading", 0, ""),
        ("reading", 429, "TooManyRequests"),
        ("reading", 503, ""),
        ("writing", 503, "SlowDown"),
        ("listing", 500, "InternalError"),
        ("deleting", 502, ""),
    ],
)
def test_a_storage_that_is_away_or_overloaded_is_waited_for(
    answer: Answer, operation: str, status: int, code: str
):
    answer(status, code)
    message = rf"^{operation} s3://bucket.*: the storage was unavailable for 0 s .*TIMEOUT"
    with pytest.raises(OSError, match=message):
        OPERATIONS[operation]("s3://bucket")


@pytest.mark.parametrize("status", [0, 503])
def test_gcs_that_is_away_or_overloaded_is_waited_for(answer: Answer, status: int):
    answer(status)
    with pytest.raises(OSError, match=r"^listing gs://bucket: the storage was unavailable for 0 s .*TIMEOUT"):
        storage.names("gs://bucket")


@pytest.mark.parametrize("scheme", ["s3", "gs"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("status", [401, 403])
def test_a_denial_is_told_at_once(answer: Answer, status: int, operation: str, scheme: str):
    answer(status)
    variable = {"s3": "AWS_ACCESS_KEY_ID", "gs": "GOOGLE_APPLICATION_CREDENTIALS"}[scheme]
    with pytest.raises(PermissionError, match=rf"^{operation} {scheme}://bucket.*denied; check {variable}"):
        OPERATIONS[operation](f"{scheme}://bucket")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (301, "PermanentRedirect", "check AWS_DEFAULT_REGION"),
        (400, "AuthorizationHeaderMalformed", "check AWS_DEFAULT_REGION"),
        (
            400,
            "ExpiredToken",
            "have expired; set fresh AWS_ACCESS_KEY_ID|whether AWS_SESSION_TOKEN has expired",
        ),
        (507, "XMinioStorageFull", "HTTP status 507"),
    ],
)
def test_a_refusal_is_told_at_once(answer: Answer, status: int, code: str, message: str, operation: str):
    answer(status, code)
    with pytest.raises(OSError, match=message) as error:
        OPERATIONS[operation]("s3://bucket")
    assert "was unavailable" not in str(error.value)
    assert "\n" not in str(error.value)
    assert "hunter2" not in str(error.value)


def test_a_host_that_is_not_found_may_come_back():
    client = fs.S3FileSystem(
        endpoint_override="http://nowhere.invalid",
        region="us-east-1",
        access_key="me",
        secret_key="mine",
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
    )
    with pytest.raises(OSError, match="resolve") as error:
        client.get_file_info("bucket")
    assert transient(error.value)


def test_a_call_is_tried_until_it_succeeds_with_a_warning_at_either_end(caplog: pytest.LogCaptureFixture):
    faults = iter([ConnectionResetError("reset"), TimeoutError("late"), ConnectionRefusedError("refused")])

    def call() -> str:
        for fault in faults:
            raise fault
        return "content"

    with caplog.at_level(logging.WARNING):
        assert retrying(call, "reading it") == "content"
    waiting, back = caplog.messages
    assert waiting == "reading it: waiting for the storage (reset)"
    assert back.startswith("reading it: the storage is back after ")


_DENIED = OSError("When reading key 'a' in bucket 'b': AWS Error ACCESS_DENIED during GetObject operation")


def test_a_server_that_has_just_come_back_may_deny_for_a_while():
    faults = iter([ConnectionRefusedError("refused"), _DENIED])

    def call() -> str:
        for fault in faults:
            raise fault
        return "content"

    assert retrying(call, "reading it") == "content"


def test_its_denial_may_be_the_first_that_is_heard_of_its_absence():
    faults = iter([None, _DENIED, _DENIED])

    def call() -> None:
        for fault in faults:
            if fault:
                raise fault
            return

    for key in ("first", "second"):
        retrying(call, f"reading s3://has-answered/{key}")


@pytest.mark.parametrize(("first", "at_once"), [(_DENIED, True), (ConnectionRefusedError("refused"), False)])
def test_one_that_denies_for_good_is_told_of(first: OSError, at_once: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DIPTYCH_STORAGE_TIMEOUT", "1")
    faults, calls = chain([first], repeat(_DENIED)), []

    def call() -> None:
        calls.append(1)
        raise next(faults)

    with pytest.raises(PermissionError, match=r"reading s3:.*: access was denied; check AWS_ACCESS_KEY_ID"):
        retrying(call, "reading s3://never-answered/key")
    assert (len(calls) == 1) == at_once


def test_a_call_that_succeeds_is_made_once_and_says_nothing(caplog: pytest.LogCaptureFixture):
    calls = []
    assert retrying(lambda: calls.append(1), "counting") is None
    assert calls == [1]
    assert caplog.messages == []


@pytest.mark.parametrize(
    "error", [ValueError("ours"), pa.ArrowInvalid("torn"), IsADirectoryError(21, "is a directory", "path")]
)
def test_an_error_that_is_not_the_storages_goes_through_at_once(error: Exception):
    calls = []

    def call() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)) as raised:
        retrying(call, "reading it")
    assert raised.value is error
    assert calls == [1]


def test_a_timeout_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("DIPTYCH_STORAGE_TIMEOUT", "2 minutes")
    with pytest.raises(ValueError, match="DIPTYCH_STORAGE_TIMEOUT=2 minutes is not a number of seconds"):
        storage.read("s3://bucket/key")


def test_an_error_is_told_in_one_line():
    assert first_line(pa.ArrowInvalid("first\nsecond\n")) == "first"
    assert first_line(ValueError()) == "ValueError"
