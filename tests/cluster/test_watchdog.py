"""The process that outlives a command: it speaks where the command did not, and ends nothing but Ray's."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from processes import running

_COMMAND = """
import sys
from cluster.watchdog import watched
with watched(("train", "--resume", "/my runs/first"), sys.argv[1], sys.argv[2]):
    print("watched", flush=True)
    sys.stdin.read()
"""

_SAID = "resume with: diptych train --resume '/my runs/first'\n"


def _command(folder: Path, ray: Path) -> subprocess.Popen:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", _COMMAND, str(folder), str(ray)]
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout
    assert process.stdout.readline() == "watched\n"
    return process


def test_it_says_nothing_where_the_command_comes_to_its_end(tmp_path: Path) -> None:
    assert _command(tmp_path, tmp_path).communicate("", timeout=30) == ("", "")


_FORKING = """
import os, sys, time
from cluster.watchdog import watched
with watched(("train", "--resume", "/my runs/first"), None, ""):
    if child := os.fork():
        print(child, flush=True)
        sys.stdin.read()
    elif sys.argv[1] == "leaves":
        sys.exit()
    else:
        time.sleep(600)
"""


@pytest.mark.parametrize("child_s_way", ["leaves", "stays"])
def test_a_fork_of_the_command_neither_speaks_for_it_nor_hides_its_end(
    child_s_way: str, tmp_path: Path
) -> None:
    pipe, children = subprocess.PIPE, list[int]()
    for end in ("", "killed"):
        said = tmp_path / f"said{end}"
        with said.open("w") as err:
            command = [sys.executable, "-c", _FORKING, child_s_way]
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=err, text=True)
        with process:
            assert process.stdout
            children.append(int(process.stdout.readline()))
            try:
                if child_s_way == "leaves":
                    _wait_until(lambda: not running(children))
                if end:
                    process.kill()
                    _wait_until(lambda said=said: said.read_text().endswith(_SAID))
                else:
                    assert process.stdin
                    process.stdin.close()
                    assert process.wait(30) == 0
                    assert said.read_text() == ""
            finally:
                for child in running(children):
                    os.kill(child, signal.SIGKILL)


_WITHOUT = """
import sys
from cluster.ray_cluster import cluster
sys.executable = "/nowhere/python"
try:
    with cluster(cpus=1):
        pass
except OSError as error:
    import ray
    print(error.filename, ray.is_initialized())
"""


@pytest.mark.ray
def test_where_it_cannot_be_started_ray_is_not_connected_either(ray_cluster: None) -> None:
    there = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-c", _WITHOUT]
    done = subprocess.run(command, env=there, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "/nowhere/python False\n", done.stderr


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_after_a_sudden_end_it_says_how_to_resume_and_ends_ray_s_processes_alone(tmp_path: Path) -> None:
    folder, ray = tmp_path / "diptych-1" / "ray", tmp_path / "packages" / "ray"
    for place in (folder, ray):
        place.mkdir(parents=True)
    (folder / "log").touch()
    (ray / "raylet").symlink_to("/bin/sleep")
    command = _command(folder, ray)
    with (folder / "log").open() as log:
        raylet = subprocess.Popen([str(ray / "raylet"), "600"], stdin=log)
        elsewhere = subprocess.Popen([str(ray / "raylet"), "601"])
        bystander = subprocess.Popen(["tail", "-f", str(folder / "log")])
    try:
        os.kill(command.pid, signal.SIGKILL)
        assert raylet.wait(30) == -signal.SIGKILL
        assert command.communicate(timeout=30)[1].endswith(_SAID)
        assert elsewhere.poll() is None
        assert bystander.poll() is None
    finally:
        for process in (raylet, elsewhere, bystander):
            process.kill()
            process.wait()
