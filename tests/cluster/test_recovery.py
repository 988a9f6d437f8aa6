"""Runs whose workers, nodes and drivers are really killed go on, and end as undisturbed ones do."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import Pool
from processes import cluster_processes, held, offspring, training_workers

from cluster import local_cluster
from cluster.cli.main import app, main
from cluster.digits import scattered_digits
from cluster.train import run_training
from pipelines.shards import write_shards
from training.config import TrainConfig

pytestmark = pytest.mark.ray

_STEPS, _EVERY = 60, 10


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovery")
    rows = scattered_digits(400, held_out=False, seed=4)
    write_shards(rows, str(folder), rows_per_shard=100, rows_per_group=50)
    return folder


@pytest.fixture(scope="module")
def address(ray_cluster: None) -> str:
    import ray

    return ray.get_runtime_context().gcs_address


def _start(
    arguments: list[str], address: str, log: Path, *, before: str = "", **environment: str
) -> subprocess.Popen:
    """A real `diptych` on the cluster at `address`; what it says goes to `log`."""
    environment = os.environ | {"RAY_ADDRESS": address} | environment
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-c", f"{before}from cluster.cli.main import main; main({arguments!r})"],
            env=environment, stdout=out, stderr=out,
        )  # fmt: skip


def _training(
    images: Path, output: Path, name: str, workers: str, *, timeout: int = 60, steps: int = _STEPS
) -> list[str]:
    return (
        ["train", "--data.train", str(images), "--output", str(output), "--name", name, "--workers", workers]
        + ["--data.recipe", "simclr-cifar", "--data.window-rows", "24", "--encoder.name", "resnet8"]
        + ["--projector.hidden-dim", "64", "--projector.dim", "32", "--temperature", "1.0"]
        + ["--batch-size", "64", "--lanes", "4", "--steps", str(steps), "--timeout", str(timeout)]
        + ["--checkpoint.every-steps", str(_EVERY), "--evaluation.diagnostic-images", "0"]
        + ["--optimizer.name", "sgd", "--optimizer.learning-rate", "0.02"]
    )


def _config(arguments: list[str]) -> TrainConfig:
    """The config that the command makes of them."""
    return app.parse_args(arguments)[1].arguments["run"]


def _wait(condition: Callable[[], Any], process: subprocess.Popen, log: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def _has(run: Path, step: int) -> Callable[[], bool]:
    return (run / "checkpoints" / f"step-{step:09}.pt").exists


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _losses(run: Path) -> list[float]:
    steps = [line for line in _lines(run) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, _STEPS + 1))
    return [line["loss"] for line in steps]


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"step-{_STEPS:09}.pt", weights_only=True)["model"]


def _assert_same_run(run: Path, other: Path) -> None:
    """Bit for bit."""
    assert _losses(run) == _losses(other)
    for key, value in _weights(other).items():
        assert torch.equal(_weights(run)[key], value), key


@pytest.fixture(scope="module")
def undisturbed(images: Path, pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `_training` on two workers, to whom nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_training(_config(_training(images, folder, "whole", "2")), launch=pool.launch)
    return folder / "whole"


def _metrics() -> str:
    """What a Prometheus would read of the cluster's one node."""
    import ray

    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url) as answer:
        return answer.read().decode()


def _worker_logs() -> str:
    import ray

    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    return "".join(path.read_text() for path in logs.glob("worker-*.err"))


def _workers_left(others: Collection[int], count: int) -> None:
    """Wait until there are `count` workers beside those others."""
    deadline = time.monotonic() + 60
    while len(left := training_workers().keys() - others) != count:
        assert time.monotonic() < deadline, f"{left} are not {count}"
        time.sleep(0.1)


def test_a_run_whose_workers_and_driver_are_killed_ends_bit_for_bit_as_an_undisturbed_one(
    images: Path, address: str, undisturbed: Path, pool: Pool, tmp_path: Path
) -> None:
    log, run, others = tmp_path / "log", tmp_path / "run", training_workers().keys()
    process = _start(_training(images, tmp_path, "run", "2", timeout=8), address, log)
    for reached, ending in ((1, signal.SIGKILL), (2, signal.SIGSTOP)):
        _wait(_has(run, reached * _EVERY), process, log)
        before = log.read_text().count("resuming from this step: worker")
        os.kill(max(training_workers().keys() - others), ending)
        _wait(lambda: log.read_text().count("resuming from this step: worker") > before, process, log)  # noqa: B023
    _wait(_has(run, 3 * _EVERY), process, log)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _workers_left(others, 0)
    assert not _has(run, _STEPS)()

    process = _start(["train", "--resume", str(run)], address, log)
    saved = max(line["step"] for line in _lines(run))
    _wait(lambda: any(line["step"] > saved for line in _lines(run)), process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    saved = max(int(path.stem[5:]) for path in (run / "checkpoints").glob("*.pt"))
    assert 3 * _EVERY < saved < _STEPS
    assert (
        f"stopped after step {saved} of {_STEPS}; resume with: diptych train --resume {run}"
        in log.read_text()
    )
    assert [line["step"] for line in _lines(run) if "loss" in line] == list(range(1, saved + 1))

    shutil.copytree(run, tmp_path / "more")
    run_training(_config(["train", "--resume", str(run)]), launch=pool.launch)
    _assert_same_run(run, undisturbed)
    main(["train", "--resume", str(tmp_path / "more"), "--workers", "4"])
    np.testing.assert_allclose(_losses(tmp_path / "more"), _losses(undisturbed), rtol=1e-3)


@pytest.mark.slow
def test_a_run_is_in_the_cluster_s_metrics_and_ctrl_c_twice_ends_it_at_once(
    images: Path, address: str, tmp_path: Path
) -> None:
    others = training_workers().keys()
    process = _start(_training(images, tmp_path, "watched", "1", steps=3000), address, tmp_path / "log")
    _wait(lambda: "diptych_loss{" in _metrics() and 'run="watched"' in _metrics(), process, tmp_path / "log")
    assert "watched rank 0 INFO: steps 1 to 3000, lanes 0, 1, 2, 3" in _worker_logs()
    (worker,) = training_workers().keys() - others
    os.kill(worker, signal.SIGSTOP)  # The first Ctrl-C alone would wait for it.
    process.send_signal(signal.SIGINT)
    _wait(
        lambda: "a second signal ends it at once" in (tmp_path / "log").read_text(), process, tmp_path / "log"
    )
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 128 + signal.SIGINT, (tmp_path / "log").read_text()
    assert "interrupted; the same command resumes" in (tmp_path / "log").read_text()


# On this machine nobody takes the lease of a process that is alive.
_ELSEWHERE = "from training import lease; lease._machine = lambda: 'another machine'; "


def _files(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def _lease_key(run: Path) -> str:
    return json.loads((run / "lease.json").read_text())["key"]


@pytest.mark.slow
def test_a_run_that_is_taken_over_ends_with_one_line_and_leaves_the_other_undisturbed(
    images: Path, address: str, undisturbed: Path, tmp_path: Path
) -> None:
    log, theirs, run = tmp_path / "log", tmp_path / "theirs", tmp_path / "run"
    others = training_workers().keys()
    first = _start(_training(images, tmp_path, "run", "2", timeout=600), address, log)
    _wait(_has(run, _EVERY), first, log)
    key = _lease_key(run)
    with ExitStack() as later:
        with held([first.pid]):
            with held(training_workers().keys() - others):
                second = _start(["train", "--resume", str(run)], address, theirs, before=_ELSEWHERE)
                _wait(lambda: _lease_key(run) != key, second, theirs)
                # It writes nothing itself until the first has ended.
                later.enter_context(held([second.pid]))
                before = _files(run)
            # They look at the lease themselves, while their driver is still halted.
            _workers_left(others, 0)
        assert first.wait(120) == 1, log.read_text()
        assert _files(run) == before
    line = f"diptych: process {second.pid} on {socket.gethostname()} has taken {run} over; wait until it ends"
    assert line in log.read_text().splitlines()
    assert log.read_text().count("has taken") == 1
    assert "Traceback" not in log.read_text()
    assert second.wait(600) == 0, theirs.read_text()
    _assert_same_run(run, undisturbed)
    assert not (run / "lease.json").exists()


_TWICE = """
import contextlib, os, sys
from cluster import cluster, run_training
from cluster.cli.main import app
from training.errors import ClusterLostError
config = app.parse_args(sys.argv[2:])[1].arguments["run"]
with cluster(cpus=4) if sys.argv[1] == "within" else contextlib.nullcontext():
    try:
        run_training(config)
    except ClusterLostError as lost:
        print(lost, flush=True)
        run_training(config)
print("the end", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["within", "alone"])
def test_a_script_whose_cluster_is_lost_trains_on_another_of_its_own(
    images: Path, undisturbed: Path, tmp_path: Path, way: str
) -> None:
    log, run = tmp_path / "log", tmp_path / "run"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", _TWICE, way, *_training(images, tmp_path, "run", "2")],
            env=os.environ | {"RAY_ADDRESS": "local"}, stdout=out, stderr=out,
        )  # fmt: skip
    _wait(_has(run, _EVERY), process, log)
    (head,) = (one for one, title in offspring(process.pid).items() if "gcs_server" in title.split()[0])
    os.kill(head, signal.SIGKILL)
    assert process.wait(300) == 0, log.read_text()
    said = log.read_text()
    assert f"no longer answers; resume with: diptych train --resume {run}\n" in said
    assert said.endswith("the end\n")
    _assert_same_run(run, undisturbed)


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A cluster of its own: a head without room for a worker; nodes for one each are added to it."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_a_run_leaves_a_drained_node_takes_a_new_one_and_goes_on_without_one_that_is_killed(
    nodes: Any, images: Path, undisturbed: Path, tmp_path: Path
) -> None:
    log, run, others = tmp_path / "log", tmp_path / "run", training_workers().keys()
    first, second = (nodes.add_node(num_cpus=2) for _ in range(2))
    process = _start(_training(images, tmp_path, "run", "1:2"), nodes.address, log)
    _wait(_has(run, _EVERY), process, log)
    with held(training_workers().keys() - others):
        subprocess.run(
            [Path(sys.executable).parent / "ray", "drain-node", "--address", nodes.address]
            + ["--node-id", second.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
            + ["--reason-message", "spot", "--deadline-remaining-seconds", "600"],
            check=True,
            capture_output=True,
        )
    _wait(lambda: "saved, resuming on other nodes" in log.read_text(), process, log)
    _wait(lambda: _parts(run) == [2, 1], process, log)
    with held(training_workers().keys() - others):
        third = nodes.add_node(num_cpus=2)
        time.sleep(15)
    _wait(lambda: _parts(run) == [2, 1, 2], process, log)
    assert "for worker" not in log.read_text()  # None was lost yet, nor a step.
    nodes.remove_node(third, allow_graceful=False)
    assert process.wait(600) == 0, log.read_text()
    assert _parts(run) == [2, 1, 2, 1]
    assert "resuming from this step: worker" in log.read_text()
    np.testing.assert_allclose(_losses(run), _losses(undisturbed), rtol=1e-3)
    assert first.remaining_processes_alive()


def _parts(run: Path) -> list[int]:
    """How many workers the run has had, from start to start."""
    return [line["workers"] for line in _lines(run) if "workers" in line]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def growing() -> Iterator[str]:
    """The address of a head without room for a worker, whose real autoscaler starts nodes that have it."""
    port, folder, head = _free_port(), tempfile.mkdtemp(prefix="diptych-"), "f" * 51 + "00000"
    address = f"127.0.0.1:{port}"
    empty = ("auth", "file_mounts", "docker")
    lists = (
        "cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands",
        "head_setup_commands", "worker_setup_commands", "head_start_ray_commands",
        "worker_start_ray_commands",
    )  # fmt: skip
    config = {
        "cluster_name": "growing",
        "max_workers": 2,
        "provider": {
            "type": "external",
            # Its nodes are real raylets on this machine.
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "head_node_id": head,
            "gcs_address": address,
            "launch_multiple": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "idle_timeout_minutes": 5,
        "upscaling_speed": 1.0,
        "file_mounts_sync_continuously": False,
        **{key: {} for key in empty},
        **{key: [] for key in lists},
    }
    (Path(folder) / "cluster.json").write_text(json.dumps(config))
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": head,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "DIPTYCH_TEST": folder,
    }
    process = subprocess.Popen(
        [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--node-ip-address", "127.0.0.1"]
        + ["--port", str(port), "--num-cpus", "0", "--temp-dir", folder, "--include-dashboard", "false"]
        + ["--autoscaling-config", f"{folder}/cluster.json"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not local_cluster.answers(address):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield address
    finally:
        while started := cluster_processes(f"DIPTYCH_TEST={folder}", folder):  # Some start others meanwhile.
            for one in started:
                with suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
            process.poll()
            time.sleep(0.1)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_a_run_asks_a_cluster_that_grows_by_itself_for_its_nodes_and_for_those_that_are_lost(
    growing: str, images: Path, tmp_path: Path
) -> None:
    log, run, open_to_all = tmp_path / "log", tmp_path / "run", {"RAY_AUTH_MODE": "disabled"}
    others = training_workers().keys()
    training = _training(images, tmp_path, "run", "2", steps=2 * _EVERY)
    assert _start(training, growing, log, **open_to_all).wait(60) == 2
    assert "workers=2 need 4 CPUs of the cluster, which has 0; try --wait-for-nodes 1800" in log.read_text()
    doctor = ["doctor", "--workers", "1", "--wait-for-nodes", "200"]
    assert _start(doctor, growing, log, **open_to_all).wait(300) == 0, log.read_text()
    process = _start([*training, "--wait-for-nodes", "200"], growing, log, **open_to_all)
    _wait(_has(run, _EVERY), process, log)
    assert "waiting for nodes with room for 2 workers" in log.read_text()
    raylet = next(raylet for worker, raylet in training_workers().items() if worker not in others)
    os.kill(raylet, signal.SIGKILL)
    assert process.wait(600) == 0, log.read_text()
    assert "resuming from this step: worker" in log.read_text()
    assert [line["step"] for line in _lines(run) if "loss" in line] == list(range(1, 2 * _EVERY + 1))
