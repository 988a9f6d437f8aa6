"""The watch for spot notices understands the clouds, and has Ray drain its own node."""

import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from cluster.deploy import spot_notice


@contextmanager
def metadata_service(answers: dict[tuple[str, str], str]) -> Iterator[str]:
    """An HTTP server that knows these answers, by method and path, and wants a cloud's header."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = {"X-aws-ec2-metadata-token": "session", "Metadata-Flavor": "Google"}
            known = any(self.headers.get(name) == value for name, value in wanted.items())
            self._answer(answers.get(("GET", self.path)) if known else None)

        def do_PUT(self) -> None:
            known = "X-aws-ec2-metadata-token-ttl-seconds" in self.headers
            self._answer(answers.get(("PUT", self.path)) if known else None)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self, text: str | None) -> None:
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_clouds_notices_are_understood() -> None:
    aws = {("PUT", "/latest/api/token"): "session"}
    google = "/computeMetadata/v1/instance/preempted"
    with metadata_service(aws) as address:
        assert not spot_notice.noticed("aws", address)
    aws["GET", "/latest/meta-data/spot/instance-action"] = (
        '{"action": "terminate", "time": "2030-01-01T00:00:00Z"}'
    )
    with metadata_service(aws) as address:
        assert spot_notice.noticed("aws", address)
    for said, noticed in (("FALSE", False), ("TRUE", True)):
        with metadata_service({("GET", google): said}) as address:
            assert spot_notice.noticed("gcp", address) is noticed
    assert not spot_notice.noticed("gcp", address)  # Its server is gone.


def test_the_node_is_drained_by_a_command_that_ray_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.scripts.scripts import cli

    node = "ab" * 28
    raylet = subprocess.Popen(
        ["/somewhere/raylet", "-c", "input('up')", f"--node_id={node}"],
        executable=sys.executable,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert raylet.stdout
        assert raylet.stdout.read(2) == b"up"
        (tmp_path / str(raylet.pid)).symlink_to(f"/proc/{raylet.pid}")  # Others may run here too.
        assert spot_notice.node_id(tmp_path) == node
    finally:
        raylet.communicate(b"\n")
    assert raylet.returncode == 0
    recorder = tmp_path / "ray"
    recorder.write_text(f'#!/bin/sh\nfor word in "$@"; do echo "$word" >> {tmp_path}/said; done\n')
    recorder.chmod(recorder.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    spot_notice.drain(node, 110)
    name, *words = (tmp_path / "said").read_text().splitlines()
    asked = cli.commands[name].make_context(name, deepcopy(words)).params
    assert (asked["node_id"], asked["deadline_remaining_seconds"]) == (node, 110)
    assert asked["reason"] == "DRAIN_NODE_REASON_PREEMPTION"


def test_a_machine_without_ray_has_no_node(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="no raylet"):
        spot_notice.node_id(tmp_path)
