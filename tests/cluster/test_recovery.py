"""Runs whose workers, nodes and drivers are really killed go on, and end as undisturbed ones do."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.digits import scattered_digits
from pipelines.shards import write_shards

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


def _start(arguments: list[str], address: str, log: Path) -> subprocess.Popen:
    """A real `diptych` on the cluster at `address`; what it says goes to `log`."""
    environment = os.environ | {"RAY_ADDRESS": address}
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-c", f"from cluster.cli import main; main({arguments!r})"],
            env=environment, stdout=out, stderr=out,
        )  # fmt: skip


def _training(
    images: Path, output: Path, name: str, workers: str, *, timeout: int = 60, steps: int = _STEPS
) -> list[str]:
    return (
        ["train", "--data.train", str(images), "--output", str(output), "--name", name, "--workers", workers]
        + ["--data.recipe", "simclr-cifar", "--data.window-rows", "24", "--encoder.name", "resnet8"]
        + ["--projector.hidden-dim", "64", "--projector.dim", "32", "--temperature", "1.0"]
        + ["--batch-size", "96", "--lanes", "4", "--steps", str(steps), "--timeout", str(timeout)]
        + ["--checkpoint.every-steps", str(_EVERY), "--evaluation.diagnostic-images", "0"]
        + ["--optimizer.name", "sgd", "--optimizer.learning-rate", "0.02"]
    )


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
def undisturbed(images: Path, address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = _start(_training(images, folder, "whole", "2"), address, folder / "log")
    assert process.wait(600) == 0, (folder / "log").read_text()
    return folder / "whole"


def _workers() -> list[int]:
    """The processes of Ray Train's workers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:  # It has ended.
            continue
        if command.startswith(b"ray::RayTrainWorker"):
            found.append(int(path.parent.name))
    return found


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


def _wait_for_workers(count: int) -> None:
    deadline = time.monotonic() + 60
    while len(_workers()) != count:
        assert time.monotonic() < deadline, f"{_workers()} are not {count}"
        time.sleep(0.1)


def test_a_run_goes_on_by_itself_when_a_worker_is_killed(
    images: Path, address: str, undisturbed: Path, tmp_path: Path
) -> None:
    process = _start(_training(images, tmp_path, "run", "2"), address, tmp_path / "log")
    _wait(_has(tmp_path / "run", 2 * _EVERY), process, tmp_path / "log")
    os.kill(_workers()[-1], signal.SIGKILL)
    assert process.wait(600) == 0, (tmp_path / "log").read_text()
    assert "going on from there, for worker" in (tmp_path / "log").read_text()
    _assert_same_run(tmp_path / "run", undisturbed)


def test_a_run_goes_on_by_itself_when_a_worker_stalls(
    images: Path, address: str, undisturbed: Path, tmp_path: Path
) -> None:
    process = _start(_training(images, tmp_path, "run", "2", timeout=5), address, tmp_path / "log")
    _wait(_has(tmp_path / "run", 2 * _EVERY), process, tmp_path / "log")
    os.kill(_workers()[-1], signal.SIGSTOP)
    assert process.wait(600) == 0, (tmp_path / "log").read_text()
    assert "going on from there, for worker" in (tmp_path / "log").read_text()
    _assert_same_run(tmp_path / "run", undisturbed)


def test_a_run_whose_driver_is_killed_goes_on_bit_for_bit_and_on_other_numbers_of_workers_to_rounding(
    images: Path, address: str, undisturbed: Path, tmp_path: Path
) -> None:
    process = _start(_training(images, tmp_path, "same", "2"), address, tmp_path / "log")
    _wait(_has(tmp_path / "same", 3 * _EVERY), process, tmp_path / "log")
    process.send_signal(signal.SIGKILL)
    process.wait()
    _wait_for_workers(0)
    for name in ("fewer", "more"):
        shutil.copytree(tmp_path / "same", tmp_path / name)
    for name, workers in (("same", []), ("fewer", ["--workers", "1"]), ("more", ["--workers", "4"])):
        assert not _has(tmp_path / name, _STEPS)()
        process = _start(["train", "--resume", str(tmp_path / name), *workers], address, tmp_path / "log")
        assert process.wait(600) == 0, (tmp_path / "log").read_text()
    _assert_same_run(tmp_path / "same", undisturbed)
    for name in ("fewer", "more"):
        np.testing.assert_allclose(_losses(tmp_path / name), _losses(undisturbed), rtol=1e-3)


def test_a_terminated_run_saves_ends_cleanly_and_goes_on_bit_for_bit(
    images: Path, address: str, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = _start(_training(images, tmp_path, "run", "2"), address, tmp_path / "log")
    _wait(_has(run, _EVERY), process, tmp_path / "log")
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    saved = max(int(path.stem[5:]) for path in (run / "checkpoints").glob("*.pt"))
    assert _EVERY < saved < _STEPS
    assert (
        f"stopped after step {saved} of {_STEPS}; go on with: diptych train --resume {run}"
        in (tmp_path / "log").read_text()
    )
    assert [line["step"] for line in _lines(run) if "loss" in line] == list(range(1, saved + 1))
    process = _start(["train", "--resume", str(run)], address, tmp_path / "log")
    assert process.wait(600) == 0, (tmp_path / "log").read_text()
    _assert_same_run(run, undisturbed)


def test_a_run_is_in_the_cluster_s_metrics_and_ctrl_c_twice_ends_it_at_once(
    images: Path, address: str, tmp_path: Path
) -> None:
    process = _start(_training(images, tmp_path, "watched", "1", steps=3000), address, tmp_path / "log")
    _wait(lambda: "diptych_loss{" in _metrics() and 'run="watched"' in _metrics(), process, tmp_path / "log")
    assert "watched rank 0 INFO: steps 1 to 3000, lanes 0, 1, 2, 3" in _worker_logs()
    _wait_for_workers(1)  # Those of another test may still be going.
    os.kill(_workers()[0], signal.SIGSTOP)  # The first one alone would wait for it.
    process.send_signal(signal.SIGINT)
    _wait(lambda: "once more ends at once" in (tmp_path / "log").read_text(), process, tmp_path / "log")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 128 + signal.SIGINT
    assert "interrupted; the same command goes on" in (tmp_path / "log").read_text()


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A cluster of its own: a head without room for a worker, and two nodes for one each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_a_run_shrinks_when_a_node_is_killed_and_grows_when_one_is_added(
    nodes: Any, images: Path, undisturbed: Path, tmp_path: Path
) -> None:
    log, run = tmp_path / "log", tmp_path / "run"
    first, second = (nodes.add_node(num_cpus=2) for _ in range(2))
    process = _start(_training(images, tmp_path, "run", "1:2"), nodes.address, log)
    _wait(_has(run, _EVERY), process, log)
    assert len(_workers()) == 2
    nodes.remove_node(second, allow_graceful=False)
    _wait(_has(run, 3 * _EVERY), process, log)
    assert len(_workers()) == 1
    nodes.add_node(num_cpus=2)
    _wait(lambda: len(_workers()) == 2, process, log)
    assert process.wait(600) == 0, log.read_text()
    np.testing.assert_allclose(_losses(run), _losses(undisturbed), rtol=1e-3)
    assert first.remaining_processes_alive()


@pytest.mark.slow
def test_a_run_leaves_a_node_that_is_drained_without_losing_a_step(
    nodes: Any, images: Path, undisturbed: Path, tmp_path: Path
) -> None:
    log, run = tmp_path / "log", tmp_path / "run"
    _, second = (nodes.add_node(num_cpus=2) for _ in range(2))
    process = _start(_training(images, tmp_path, "run", "1:2"), nodes.address, log)
    _wait(_has(run, _EVERY), process, log)
    subprocess.run(
        [Path(sys.executable).parent / "ray", "drain-node", "--address", nodes.address]
        + ["--node-id", second.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        + ["--reason-message", "spot", "--deadline-remaining-seconds", "600"],
        check=True,
        capture_output=True,
    )
    assert process.wait(600) == 0, log.read_text()
    assert "saved, and going on from there on other nodes" in log.read_text()
    assert "for worker" not in log.read_text()
    np.testing.assert_allclose(_losses(run), _losses(undisturbed), rtol=1e-3)
