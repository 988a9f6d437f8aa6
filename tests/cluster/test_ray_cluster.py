"""Which cluster commands take, by the words that RAY_ADDRESS may be: auto and local."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import ray
from commands import diptych, started_cluster

from cluster.ray_cluster import address

pytestmark = pytest.mark.ray


def _noted(folder: Path, address: str) -> dict[str, Any]:
    """An environment in which `ray start` has recorded a cluster, and diptych none."""
    (folder / "ray").mkdir(exist_ok=True)
    (folder / "ray" / "ray_current_cluster").write_text(address)
    return {"RAY_TMPDIR": str(folder), "XDG_STATE_HOME": str(folder)}


def test_auto_without_a_cluster_is_one_line(tmp_path: Path) -> None:
    there: dict[str, Any] = {"RAY_TMPDIR": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
    done = diptych("cluster", "status", RAY_ADDRESS="auto", **there)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "diptych: RAY_ADDRESS=auto finds no Ray cluster here; start one with diptych cluster up, or unset "
        "it to run on this machine\n"
    )


def test_auto_is_the_cluster_that_ray_has_noted(ray_cluster: None, tmp_path: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    done = diptych("cluster", "status", RAY_ADDRESS="auto", **_noted(tmp_path, address))
    assert done.returncode == 0, done.stderr
    assert f"cluster at {address}" in done.stdout


def test_auto_is_left_to_ray_where_it_no_longer_tells_what_it_has_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delattr("ray._private.utils.read_ray_address")
    assert address() == "auto"


def test_a_cluster_that_was_noted_and_is_gone_is_one_line(tmp_path: Path) -> None:
    done = diptych("cluster", "status", RAY_ADDRESS="auto", **_noted(tmp_path, "127.0.0.1:1"))
    assert done.returncode == 2
    assert done.stderr.startswith("diptych: no Ray cluster answers at 127.0.0.1:1; check RAY_ADDRESS")


def test_local_is_no_cluster(tmp_path: Path) -> None:
    done = diptych("cluster", "status", RAY_ADDRESS="local", **_noted(tmp_path, "127.0.0.1:1"))
    assert done.returncode == 1
    assert done.stderr == "diptych: no cluster is running; start one with: diptych cluster up\n"


@pytest.mark.slow
def test_auto_is_diptychs_own_cluster_before_any_that_ray_has_noted(tmp_path: Path) -> None:
    with started_cluster(tmp_path, nodes=1) as state:
        there = _noted(tmp_path, "127.0.0.1:1")
        done = diptych("cluster", "status", RAY_ADDRESS="auto", **there)
        assert done.returncode == 0, done.stderr
        assert f"cluster at {state['address']}" in done.stdout
        jobs = diptych("jobs", "list", RAY_ADDRESS="auto", **there)
        assert jobs.returncode == 0, jobs.stderr


_COMMAND = """
import sys
from cluster.ray_cluster import cluster
with cluster(cpus=1):
    import ray
    print(ray.get_runtime_context().get_temp_dir(), ray.get_runtime_context().get_node_id(), flush=True)
    sys.stdin.read()
"""


def _own_cluster(place: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that has a cluster of its own until its input ends, and Ray's folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMAND], env=os.environ | {"TMPDIR": str(place), "RAY_ADDRESS": "local"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    return process, Path(process.stdout.readline().split()[0])


@pytest.mark.slow
def test_one_of_its_own_leaves_nothing_though_killed_and_needs_no_folder_of_another_user() -> None:
    place = Path(tempfile.mkdtemp(prefix="dt-", dir="/tmp"))
    (place / "ray").write_text("another's")
    killed, left = _own_cluster(place)
    assert left.parents[1] == place
    assert left.parent.stat().st_mode & 0o777 == 0o700
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert left.exists()
    ends, its = _own_cluster(place)
    assert not left.exists()
    assert its.exists()
    assert ends.communicate("")[0] == ""
    assert ends.returncode == 0
    assert os.listdir(place) == ["ray"]
    shutil.rmtree(place)
