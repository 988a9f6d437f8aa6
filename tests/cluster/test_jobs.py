"""Jobs on a cluster of three real nodes, over its HTTP interface, with data and runs in a real S3 store."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from commands import diptych, started_cluster
from processes import held, training_workers

from cluster.digits import scattered_digits
from pipelines import storage
from pipelines.shards import write_shards

pytestmark = pytest.mark.ray

_STEPS, _EVERY = 60, 10

# What a shell has for a command that SIGTERM has ended.
_STOPPED = 143


@pytest.fixture(scope="module")
def images(bucket: str) -> str:
    uri = f"{bucket}/jobs/images"
    rows = scattered_digits(400, held_out=False, seed=4)
    write_shards(rows, uri, rows_per_shard=100, rows_per_group=50)
    return uri


@pytest.fixture(scope="module")
def runs(bucket: str) -> str:
    return f"{bucket}/jobs/runs"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A state without a cluster: commands that have it start one of their own."""
    return str(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module")
def cluster(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What `diptych cluster up` notes of three nodes, each with room for one worker."""
    with started_cluster(tmp_path_factory.mktemp("state"), nodes=3) as noted:
        yield noted


@pytest.fixture
def config(images: str, runs: str, tmp_path: Path) -> Path:
    """The config of a gentle run, which rounding does not drive apart."""
    path = tmp_path / "small.toml"
    path.write_text(
        f"""
        batch_size = 64
        lanes = 4
        workers = 2
        steps = {_STEPS}
        temperature = 1.0
        output = "{runs}"
        [data]
        train = "{images}"
        recipe = "simclr-cifar"
        window_rows = 24
        [encoder]
        name = "resnet8"
        [projector]
        hidden_dim = 64
        dim = 32
        [optimizer]
        name = "sgd"
        learning_rate = 0.02
        [checkpoint]
        every_steps = {_EVERY}
        [evaluation]
        diagnostic_images = 0
        """
    )
    return path


def _submitted(*command: str) -> str:
    """The ID of a job that has been sent."""
    sent = diptych("submit", "--detach", "--", *command)
    assert sent.returncode == 0, sent.stderr
    return sent.stdout.strip()


def _wait(condition: Callable[[], Any], job: str) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, diptych("jobs", "logs", job).stdout
        time.sleep(0.1)


def _saved(run: str) -> list[int]:
    return sorted(int(name[5:14]) for name in storage.names(f"{run}/checkpoints") if name.endswith(".pt"))


def _losses(run: str) -> list[float]:
    content = storage.read(f"{run}/metrics.jsonl")
    assert content is not None
    lines = [json.loads(line) for line in content.decode().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, _STEPS + 1))
    return [line["loss"] for line in steps]


def _kill_a_node_that_trains() -> None:
    """The raylet of one, and with it all of its processes; not the head's, where the job itself is."""
    raylets = set(training_workers().values())
    others = [one for one in raylets if b"--head" not in Path(f"/proc/{one}/cmdline").read_bytes()]
    os.kill(others[0], signal.SIGKILL)


def test_a_job_whose_node_is_killed_and_that_is_then_stopped_ends_as_an_undisturbed_one_node_run(
    cluster: dict[str, str], config: Path, runs: str, elsewhere: str
) -> None:
    run = f"{runs}/disturbed"
    job = _submitted("train", str(config), "--name", "disturbed")
    _wait(lambda: _EVERY in _saved(run), job)
    _kill_a_node_that_trains()
    _wait(lambda: "going on from there, for worker" in diptych("jobs", "logs", job).stdout, job)
    reached = _saved(run)[-1]
    _wait(lambda: _saved(run)[-1] > reached, job)
    with held(training_workers()):
        stopping = Thread(target=lambda: said.append(diptych("jobs", "stop", job).stdout))
        said = list[str]()
        stopping.start()
        _wait(lambda: "once more ends at once" in diptych("jobs", "logs", job).stdout, job)
    stopping.join()
    assert said == [f"{job}: stopped\n"]
    saved = _saved(run)[-1]
    assert reached < saved < _STEPS
    assert f"stopped after step {saved} of {_STEPS}" in diptych("jobs", "logs", job).stdout
    assert diptych("jobs", "logs", "--follow", job).returncode == _STOPPED
    goes_on = diptych("submit", "--", "train", "--resume", run)
    assert goes_on.returncode == 0, goes_on.stdout + goes_on.stderr
    alone = diptych("train", str(config), "--name", "alone", "--workers", "1", XDG_STATE_HOME=elsewhere)
    assert alone.returncode == 0, alone.stderr
    np.testing.assert_allclose(_losses(run), _losses(f"{runs}/alone"), rtol=1e-3)


def test_a_search_is_submitted_as_a_run_is(
    cluster: dict[str, str], images: str, runs: str, tmp_path: Path
) -> None:
    search = tmp_path / "search.toml"
    search.write_text(
        f"""
        name = "search"
        output = "{runs}"
        searcher = "grid"
        scheduler = "none"
        concurrent = 2
        space = {{ temperature = {{ choice = [0.1, 1.0] }} }}
        [train]
        data = {{ train = "{images}", recipe = "simclr-cifar" }}
        encoder = {{ name = "resnet8" }}
        projector = {{ hidden_dim = 32, dim = 16 }}
        batch_size = 48
        lanes = 2
        epochs = 1
        workers = 1
        evaluation = {{ diagnostic_images = 0 }}
        """
    )
    searched = diptych("submit", "--", "tune", str(search))
    assert searched.returncode == 0, searched.stdout + searched.stderr
    assert storage.exists(f"{runs}/search/best.toml")
    assert f"best: {runs}/search/best.toml" in searched.stdout


def test_a_job_s_exit_code_is_submit_s_and_it_is_listed_and_shown(
    cluster: dict[str, str], config: Path
) -> None:
    failed = diptych("submit", "--", "train", str(config), "--name", "none", "--data.train", "/nowhere")
    assert failed.returncode == 2
    assert "diptych: /nowhere does not exist; give a file or a folder that does" in failed.stdout
    (job,) = re.findall(r"^job (\S+):", failed.stderr, re.M)
    (line,) = (line for line in diptych("jobs", "list").stdout.splitlines() if line.startswith(job))
    assert line.split()[1] == "FAILED"
    assert line.endswith("diptych train small.toml --name none --data.train /nowhere")
    assert "diptych-probe" not in diptych("jobs", "list").stdout
    shown = diptych("jobs", "show", job).stdout
    assert "exit code  2\n" in shown
    unknown = diptych("jobs", "show", "nix")
    assert (unknown.returncode, unknown.stderr) == (
        2, f"diptych: no job 'nix' at {cluster['dashboard']}; diptych jobs list names them\n"
    )  # fmt: skip


def test_a_dry_run_lists_what_would_be_sent_and_sends_no_job(cluster: dict[str, str], config: Path) -> None:
    before = diptych("jobs", "list").stdout
    shown = diptych("submit", "--dry-run", "--", "train", str(config))
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines() == [
        f"{cluster['dashboard']}: the cluster has this diptych: nothing is installed",
        f"{config.stat().st_size:>9,}  small.toml",
        f"{config.stat().st_size:>9,}  bytes in 1 files would be sent",
        "runs: exec python -m cluster train small.toml",
    ]
    assert diptych("jobs", "list").stdout == before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "demo", "--data.train", "images"], "images is a path in the job's own folder"),
        (["train", "demo", "--data.train", "/images"], "runs is a path in the job's own folder"),
        (["train", "demo", "--data.train", "/a", "--bach-size", "3"], "Unknown option: --bach-size"),
        (["train", "demo", "--data.train", "s3://key:secret@b/c"], "the s3:// URI carries credentials"),
        (["cluster", "down"], "cluster cannot be submitted; write: diptych submit -- train CONFIG --flags"),
        ([], "nothing cannot be submitted"),
    ],
)
def test_what_is_wrong_with_a_command_shows_before_it_is_sent(command: list[str], message: str) -> None:
    refused = diptych("submit", "--address", "http://127.0.0.1:1", "--", *command)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_a_relative_path_that_only_the_job_knows_of_is_refused_there(
    cluster: dict[str, str], images: str
) -> None:
    refused = diptych("submit", "--", "data", "pack", images, "packed")
    assert refused.returncode == 2
    assert "diptych: packed is a path in the job's own folder" in refused.stdout


def test_a_job_without_the_token_is_turned_away(cluster: dict[str, str], elsewhere: str) -> None:
    job = json.dumps({"entrypoint": "echo hello"}).encode()
    for headers in ({}, {"Authorization": f"Bearer {'0' * 32}"}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(
                urllib.request.Request(f"{cluster['dashboard']}/api/jobs/", job, headers, method="POST")
            )
        assert refused.value.code in (401, 403)
        refused.value.close()
    stranger = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32, "XDG_STATE_HOME": elsewhere}
    turned_away = diptych("jobs", "list", "--address", cluster["dashboard"], **stranger)
    assert turned_away.returncode == 2
    assert f"the Ray cluster at {cluster['dashboard']} wants its token" in turned_away.stderr


class _Relay:
    """Hands connections on to a server, until they are cut."""

    def __init__(self, port: int) -> None:
        self._to, self._open = ("127.0.0.1", port), list[socket.socket]()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        Thread(target=self._serve, daemon=True).start()

    def cut(self) -> int:
        """Cut the connections that there are; how many there were."""
        was, self._open = self._open, []
        for end in was:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        return len(was)

    def close(self) -> None:
        self._server.close()
        self.cut()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                here, there = self._server.accept()[0], socket.create_connection(self._to)
                self._open += [here, there]
                for ends in ((here, there), (there, here)):
                    Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while content := source.recv(65536):
                sink.sendall(content)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()


def test_a_connection_that_is_lost_is_made_again_and_each_line_is_shown_once(
    cluster: dict[str, str], elsewhere: str
) -> None:
    relay = _Relay(int(cluster["dashboard"].rpartition(":")[2]))
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster", "submit", "--address", f"http://127.0.0.1:{relay.port}"]
        + ["--", "doctor", "--workers", "1"],
        env=os.environ | {"RAY_AUTH_MODE": "token", "XDG_STATE_HOME": elsewhere},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    first = next(line for line in process.stdout if line.startswith("Running entrypoint"))
    assert relay.cut() > 0
    rest = process.stdout.read()
    assert process.wait(300) == 0
    relay.close()
    process.stdout.close()
    assert first not in rest
    assert rest.count("gradient self-test") == rest.count("this cluster can train") == 1


def test_no_credential_is_in_what_jobs_send_print_or_leave(
    cluster: dict[str, str], bucket: str, runs: str
) -> None:
    """The S3 store's key, which every process had: runs and a search have been trained with it by now."""
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    token = (Path.home() / ".ray" / "auth_token").read_text().strip().encode()
    places: dict[str, bytes] = {}
    # Ray's folder: its logs, the jobs' logs, and what was uploaded, as unpacked on each node.
    for path in Path(cluster["folder"]).rglob("*"):
        if path.is_file() and not path.is_symlink():
            places[str(path)] = path.read_bytes()
    for info in storage.listing(f"{bucket}/jobs"):
        places[info.path] = storage.read(f"s3://{info.path}") or b""
    for job in diptych("jobs", "list").stdout.splitlines()[1:]:
        places[job] = diptych("jobs", "show", job.split()[0]).stdout.encode()
    assert any("job-driver-train" in place for place in places)
    assert any(place.endswith("report.html") for place in places)
    assert [place for place, content in places.items() if secret in content or token in content] == []
    # The search finds what is there.
    assert any(b"window_rows" in content for content in places.values())
