"""diptych cluster: real Ray nodes on this machine, for this machine alone."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import diptych, started_cluster

from cluster.digits import scattered_digits
from pipelines.shards import write_shards

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What `diptych cluster up` notes of a cluster of two nodes."""
    folder = tmp_path_factory.mktemp("state")
    # Ray's own folder is not there yet, as on a new machine.
    with started_cluster(folder, nodes=2, RAY_TMPDIR=str(folder / "new")) as noted:
        yield noted | {"rays": str(folder / "new" / "ray")}


def _own(state: dict[str, str]) -> list[int]:
    """The cluster's processes: those with its mark, and those that write its logs."""
    mark = f"DIPTYCH_CLUSTER={state['mark']}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            marked = mark in (folder / "environ").read_bytes().split(b"\0")
            titled = (folder / "cmdline").read_bytes().startswith(b"ray")
            if marked or (
                titled and any(state["folder"] in os.readlink(link) for link in (folder / "fd").iterdir())
            ):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def _listening(processes: list[int]) -> set[str]:
    """The addresses, in hexadecimal, on which the processes listen."""
    sockets = set()
    for process in processes:
        for link in Path(f"/proc/{process}/fd").glob("*"):
            try:
                sockets |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
            except OSError:
                continue
    addresses = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                addresses.add(fields[1].partition(":")[0])
    return addresses


def test_its_nodes_are_listed_and_a_second_cluster_is_refused(state: dict[str, str]) -> None:
    listed = diptych("cluster", "status")
    assert listed.returncode == 0, listed.stderr
    assert state["address"] in listed.stdout
    assert listed.stdout.count("alive") == 2
    again = diptych("cluster", "up")
    assert again.returncode == 2
    assert again.stderr == (
        f"diptych: a cluster is running already at {state['address']}; diptych cluster down ends it\n"
    )


def test_an_address_that_is_none_of_this_machines_is_refused(tmp_path: Path) -> None:
    refused = diptych("cluster", "up", "--host", "192.0.2.254", XDG_STATE_HOME=str(tmp_path))
    assert refused.returncode == 2
    assert refused.stderr == (
        "diptych: host=192.0.2.254 is no address of this machine; leave it out, or give one\n"
    )


def test_it_listens_on_the_loopback_address_alone(state: dict[str, str]) -> None:
    addresses = _listening(_own(state))
    # 127.0.0.1, and the same as an address of IPv6.
    assert addresses == {"0100007F", "0000000000000000FFFF00000100007F"}


def test_rays_own_way_to_a_cluster_is_left_as_it_was(state: dict[str, str]) -> None:
    assert list(Path(state["rays"]).glob("ray_current_cluster")) == []
    named = Path("/tmp/ray/ray_current_cluster")
    assert not named.exists() or named.read_text().strip() != state["address"]


def test_without_the_token_it_is_closed(state: dict[str, str]) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{state['dashboard']}/api/jobs/")
    assert refused.value.code == 401
    refused.value.close()
    stranger = diptych("cluster", "status", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 32)
    assert stranger.returncode == 2
    assert f"the Ray cluster at {state['address']} wants its token" in stranger.stderr


def test_a_run_is_spread_over_its_nodes(state: dict[str, str], tmp_path: Path) -> None:
    images = tmp_path / "images"
    write_shards(
        scattered_digits(64, held_out=False, seed=0), str(images), rows_per_shard=32, rows_per_group=16
    )
    # A worker takes two CPUs: there is room for one on each node.
    run = diptych(
        "train", "--data.train", str(images), "--data.recipe", "simclr-cifar", "--encoder.name", "resnet8",
        "--projector.hidden-dim", "32", "--projector.dim", "16", "--batch-size", "16", "--lanes", "2",
        "--workers", "2", "--steps", "2", "--evaluation.diagnostic-images", "0", "--output", str(tmp_path),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)] == [1, 2]


def test_it_can_be_taken_down_after_a_crash_and_nothing_else_is(state: dict[str, str]) -> None:
    # It has a log of the cluster's open, as whoever looks at one has.
    (log, *_) = Path(state["folder"]).glob("session_latest/logs/*.log")
    waits = f"import time; log = open({str(log)!r}); time.sleep(600)"
    control = subprocess.Popen([sys.executable, "-c", waits])
    try:
        (holder,) = (
            process for process in _own(state)
            if b"cluster.embedded import" in Path(f"/proc/{process}/cmdline").read_bytes()
        )  # fmt: skip
        os.kill(holder, signal.SIGKILL)
        down = diptych("cluster", "down")
        assert re.fullmatch(r"[1-9]\d* processes ended\n", down.stdout), down.stderr
        time.sleep(0.5)
        assert _own(state) == []
        assert control.poll() is None
    finally:
        control.kill()
        control.wait()
    gone = diptych("cluster", "status")
    assert gone.returncode == 1
    assert gone.stderr == "diptych: no cluster is running; start one with: diptych cluster up\n"
    assert diptych("cluster", "down").stdout == "0 processes ended\n"
