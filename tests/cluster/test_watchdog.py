"""The process that outlives a command: it speaks where the command did not, and ends nothing but Ray's."""

import os
import signal
import subprocess
import sys
from pathlib import Path

_COMMAND = """
import sys
from cluster.watchdog import watched
with watched(("train", "--resume", "/my runs/first"), sys.argv[1], sys.argv[2]):
    print("watched", flush=True)
    sys.stdin.read()
"""

_SAID = "go on with: diptych train --resume '/my runs/first'\n"


def _command(folder: Path, ray: Path) -> subprocess.Popen:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", _COMMAND, str(folder), str(ray)]
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout
    assert process.stdout.readline() == "watched\n"
    return process


def test_it_says_nothing_where_the_command_comes_to_its_end(tmp_path: Path) -> None:
    assert _command(tmp_path, tmp_path).communicate("", timeout=30) == ("", "")


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
