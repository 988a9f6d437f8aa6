"""Several jobs on a real cluster: they wait for each other, are stopped at any time, lose supervisors."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from commands import diptych, started_cluster
from processes import cluster_processes, held, running, training_workers

from cluster.digits import scattered_digits
from pipelines.shards import write_shards

pytestmark = [pytest.mark.ray, pytest.mark.slow]

_STEPS = 30

# All at once, after asking once what the cluster has.
_SUBMIT = """
import sys
from cluster.jobs import Jobs
from cluster.staging import requirements, stage
jobs, config, *names = Jobs(), *sys.argv[1:]
commands = [("train", config, "--name", name) for name in names]
there = jobs.probe(requirements(commands[0]))
print(*[jobs.submit(stage(command, there)) for command in commands])
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of two nodes with two CPUs each: there is room for one run of two workers."""
    with started_cluster(tmp_path_factory.mktemp("state"), nodes=2) as noted:
        yield noted


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def config(runs: Path) -> Path:
    """A run that saves after each step."""
    rows = scattered_digits(400, held_out=False, seed=4)
    write_shards(rows, str(runs / "images"), rows_per_shard=100, rows_per_group=50)
    path = runs / "small.toml"
    path.write_text(
        f"""
        batch_size = 64
        lanes = 4
        workers = 2
        steps = {_STEPS}
        output = "{runs}"
        data = {{ train = "{runs}/images", recipe = "simclr-cifar", window_rows = 24 }}
        encoder = {{ name = "resnet8" }}
        projector = {{ hidden_dim = 64, dim = 32 }}
        checkpoint = {{ every_steps = 1 }}
        evaluation = {{ diagnostic_images = 0 }}
        """
    )
    return path


def _submit(config: Path, *names: str) -> list[str]:
    """Send a job for a run of each name; the jobs."""
    sent = subprocess.run(
        [sys.executable, "-c", _SUBMIT, str(config), *names], capture_output=True, text=True, timeout=300
    )
    assert sent.returncode == 0, sent.stderr
    return sent.stdout.split()[-len(names) :]


def _log(cluster: dict[str, str], job: str) -> str:
    path = Path(cluster["folder"]) / "session_latest" / "logs" / f"job-driver-{job}.log"
    try:
        return path.read_text()
    except FileNotFoundError:  # Ray may put it elsewhere between a look and the reading.
        return ""


def _status(job: str) -> str:
    (line,) = (line for line in diptych("jobs", "list").stdout.splitlines() if line.startswith(job))
    return line.split()[1]


def _wait(condition: Callable[[], Any], told: Callable[[], str], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.02)


def _wait_for_checkpoint(runs: Path, name: str, step: int, told: Callable[[], str]) -> None:
    _wait(lambda: (runs / name / "checkpoints" / f"step-{step:09}.pt").exists(), told)


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"step-{_STEPS:09}.pt", weights_only=True)["model"]


def _assert_same(run: Path, other: Path) -> None:
    for key, value in _weights(other).items():
        assert torch.equal(_weights(run)[key], value), key


@pytest.fixture(scope="module")
def queued(cluster: dict[str, str], config: Path) -> dict[str, str]:
    """What each of three jobs has printed that were sent at once, by its run's name; none had an accident."""
    names = [f"queued-{number}" for number in range(3)]
    jobs = dict(zip(names, _submit(config, *names), strict=True))

    def states() -> set[str]:
        listed = [line.split() for line in diptych("jobs", "list").stdout.splitlines()]
        return {words[1] for words in listed if words[0] in jobs.values()}

    deadline = time.monotonic() + 540
    while states() & {"PENDING", "RUNNING"}:
        assert time.monotonic() < deadline, {name: _log(cluster, job) for name, job in jobs.items()}
        time.sleep(5)
    logs = {name: _log(cluster, job) for name, job in jobs.items()}
    assert states() == {"SUCCEEDED"}, logs
    return logs


def test_three_jobs_where_one_fits_end_well_one_after_another(queued: dict[str, str], runs: Path) -> None:
    waited = re.compile(r"waiting for 4 CPUs; [\d.]+ of the cluster's 4 are in use by 1 other run")
    assert sum(bool(waited.search(log)) for log in queued.values()) == len(queued) - 1
    assert any("1 other waits before it" in log for log in queued.values())
    assert not any("resuming from this step" in log for log in queued.values())
    for name in queued:
        _assert_same(runs / name, runs / "queued-0")


def test_a_second_job_of_the_same_name_is_refused_and_one_stopped_while_it_saves_can_be_resumed(
    cluster: dict[str, str], config: Path, runs: Path, queued: dict[str, str]
) -> None:
    others = training_workers().keys()
    (first,) = _submit(config, "twice")
    _wait_for_checkpoint(runs, "twice", 2, lambda: _log(cluster, first))
    with held(training_workers().keys() - others):
        second = diptych("submit", "--", "train", str(config), "--name", "twice")
    assert second.returncode == 2
    assert f"{runs}/twice is being written by process " in second.stdout
    partial = (runs / "twice" / "checkpoints").glob
    _wait(lambda: next(partial(".step-*.partial"), None), lambda: _log(cluster, first))
    said = list[str]()
    stopping = Thread(target=lambda: said.append(diptych("jobs", "stop", first).stdout))
    with held(training_workers().keys() - others):  # Else it may have finished before the signal comes.
        stopping.start()
        _wait(lambda: "a second signal ends it at once" in _log(cluster, first), lambda: _log(cluster, first))
    stopping.join()
    assert said == [f"{first}: stopped\n"]
    assert f"of {_STEPS}; resume with: diptych train --resume {runs}/twice" in _log(cluster, first)
    resumed = diptych("submit", "--", "train", "--resume", str(runs / "twice"))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    _assert_same(runs / "twice", runs / "queued-0")


def test_a_job_stopped_as_it_starts_ends_and_leaves_nothing(
    cluster: dict[str, str], config: Path, runs: Path
) -> None:
    others = training_workers().keys()
    (job,) = _submit(config, "early")
    _wait(lambda: "starting 2 workers" in _log(cluster, job), lambda: _log(cluster, job))
    assert diptych("jobs", "stop", job).stdout == f"{job}: stopped\n"
    _wait(lambda: training_workers().keys() == others, lambda: _log(cluster, job), 10)
    assert not (runs / "early" / "lease.json").exists()


def _started(config: Path, name: str, log: Path) -> subprocess.Popen:
    """A run that is no job, on the cluster; what it says goes to `log`."""
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "cluster", "train", str(config), "--name", name], stdout=out, stderr=out
        )


def test_a_run_whose_supervisor_is_killed_leaves_no_orphan_and_can_be_resumed(
    cluster: dict[str, str], config: Path, runs: Path, queued: dict[str, str]
) -> None:
    others = training_workers().keys()
    (job,) = _submit(config, "unsupervised")
    _wait_for_checkpoint(runs, "unsupervised", 2, lambda: _log(cluster, job))
    processes = cluster_processes(f"DIPTYCH_CLUSTER={cluster['mark']}", cluster["folder"])
    titles = {one: Path(f"/proc/{one}/cmdline").read_bytes() for one in processes}
    (supervisor,) = (one for one, title in titles.items() if title.startswith(b"ray::JobSupervisor"))
    (driver,) = (one for one, title in titles.items() if b"cluster\0train\0" in title)
    orphans = {driver, *(training_workers().keys() - others)}
    os.kill(supervisor, signal.SIGKILL)
    _wait(lambda: not running(orphans), lambda: str({one: titles.get(one) for one in running(orphans)}), 10)
    _wait(lambda: _status(job) == "FAILED", lambda: _status(job))  # Ray looks now and then.
    resumed = diptych("submit", "--", "train", "--resume", str(runs / "unsupervised"))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    _assert_same(runs / "unsupervised", runs / "queued-0")


def test_a_run_on_a_cluster_whose_head_is_killed_says_how_to_resume_and_leaves_no_worker(
    cluster: dict[str, str], config: Path, runs: Path, tmp_path: Path
) -> None:
    """The last one: there is no cluster after it."""
    others, log = training_workers().keys(), tmp_path / "log"
    process = _started(config, "headless", log)
    _wait_for_checkpoint(runs, "headless", 2, log.read_text)
    (head,) = (
        one
        for one in cluster_processes(f"DIPTYCH_CLUSTER={cluster['mark']}", cluster["folder"])
        if b"gcs_server" in Path(f"/proc/{one}/cmdline").read_bytes().split(b"\0")[0]
    )
    with held(workers := training_workers().keys() - others):
        os.kill(head, signal.SIGKILL)
        assert process.wait(30) == 1
    told = "diptych: the head of the Ray cluster no longer answers; resume with: diptych train --resume "
    assert f"{told}{runs}/headless\n" in log.read_text()
    _wait(lambda: not running(workers), lambda: f"{running(workers)} are left", 10)
