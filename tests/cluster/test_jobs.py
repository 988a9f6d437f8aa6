"""A cluster of three real nodes on this machine, and jobs on it, with data and runs in a real S3 store."""

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
import requests
from commands import diptych, started_cluster
from pool import Pool
from processes import LOOPBACK, cluster_processes, held, listening, training_workers
from ray.dashboard.modules.dashboard_sdk import SubmissionClient

from cluster.cli.main import app, main
from cluster.digits import scattered_digits
from cluster.jobs import limit_answers
from cluster.train import run_training
from pipelines import storage
from pipelines.shards import write_shards

pytestmark = pytest.mark.ray

_STEPS, _EVERY = 50, 10

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
    """A state without a cluster: commands that have it do not know of this one."""
    return str(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module")
def cluster(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Notes of `diptych cluster up` on three nodes, each with room for one worker.

    There may be two when a test begins: `disturbed` kills one.
    """
    folder = tmp_path_factory.mktemp("state")
    # Ray's own folder can be none, as where it is another user's.
    (folder / "ray").write_text("another's")
    with started_cluster(folder, nodes=3, RAY_TMPDIR=str(folder)) as noted:
        yield noted | {"rays": str(folder / "ray")}


@pytest.fixture(scope="module")
def config(images: str, runs: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a gentle run, which rounding does not drive apart."""
    path = tmp_path_factory.mktemp("config") / "small.toml"
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
        learning_rate = 0.01
        [checkpoint]
        every_steps = {_EVERY}
        [evaluation]
        diagnostic_images = 0
        """
    )
    return path


def _asked(cluster: dict[str, str], path: str, method: str = "GET", token: str | None = None) -> bytes:
    """The cluster's answer; `token` is the cluster's own unless given, and "" none."""
    token = _token() if token is None else token
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    body = json.dumps({"entrypoint": "echo hello"}).encode() if method == "POST" else None
    request = urllib.request.Request(f"{cluster['dashboard']}{path}", body, headers, method=method)
    with urllib.request.urlopen(request) as answer:
        return answer.read()


def _token() -> str:
    return (Path.home() / ".ray" / "auth_token").read_text().strip()


def _log(cluster: dict[str, str], job: str) -> str:
    """Output of the job: its file, as the command takes longer."""
    path = Path(cluster["folder"]) / "session_latest" / "logs" / f"job-driver-{job}.log"
    return path.read_text() if path.exists() else ""


def _saved(run: str) -> list[int]:
    return sorted(int(name[5:14]) for name in storage.names(f"{run}/checkpoints") if name.endswith(".pt"))


def _losses(run: str) -> list[float]:
    content = storage.read(f"{run}/metrics.jsonl")
    assert content is not None
    lines = [json.loads(line) for line in content.decode().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, _STEPS + 1))
    return [line["loss"] for line in steps]


def _workers(cluster: dict[str, str]) -> dict[int, int]:
    """Each of the cluster's workers by its process, with its node's raylet."""
    folder = cluster["folder"].encode()
    return {
        worker: raylet
        for worker, raylet in training_workers().items()
        if folder in Path(f"/proc/{raylet}/cmdline").read_bytes()
    }


def _kill_a_node_that_trains(cluster: dict[str, str]) -> None:
    """The raylet of one, and with it all of its processes; not the head's, where the job itself is."""
    raylets = set(_workers(cluster).values())
    assert len(raylets) == 2  # The two workers are on two nodes.
    others = [one for one in raylets if b"--head" not in Path(f"/proc/{one}/cmdline").read_bytes()]
    os.kill(others[0], signal.SIGKILL)


@pytest.fixture(scope="module")
def disturbed(cluster: dict[str, str], config: Path, runs: str) -> str:
    """A run that was sent as a job, has lost a node, was stopped, and has gone on to its end as a job."""
    run = f"{runs}/disturbed"
    sent = diptych("submit", "--detach", "--", "train", str(config), "--name", "disturbed")
    assert sent.returncode == 0, sent.stderr
    job = sent.stdout.strip()

    def wait(condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            assert time.monotonic() < deadline, _log(cluster, job)
            time.sleep(0.1)

    wait(lambda: _EVERY in _saved(run))
    _kill_a_node_that_trains(cluster)
    wait(lambda: "resuming from this step: worker" in _log(cluster, job))
    reached = _saved(run)[-1]
    wait(lambda: _saved(run)[-1] > reached)
    with held(_workers(cluster)):
        stopping = Thread(target=lambda: said.append(diptych("jobs", "stop", job).stdout))
        said = list[str]()
        stopping.start()
        wait(lambda: "a second signal ends it at once" in _log(cluster, job))
    stopping.join()
    assert said == [f"{job}: stopped\n"]
    saved = _saved(run)[-1]
    assert reached < saved < _STEPS
    followed = diptych("jobs", "logs", "--follow", job)
    assert followed.returncode == _STOPPED
    assert f"stopped after step {saved} of {_STEPS}" in followed.stdout
    assert followed.stdout == diptych("jobs", "logs", job).stdout == _log(cluster, job)
    # One worker is enough, and sooner there than two.
    goes_on = diptych("submit", "--", "train", "--resume", run, "--workers", "1")
    assert goes_on.returncode == 0, goes_on.stdout + goes_on.stderr
    return run


def test_a_job_whose_node_is_killed_and_that_is_then_stopped_ends_as_an_undisturbed_one_node_run(
    disturbed: str, config: Path, runs: str, pool: Pool
) -> None:
    arguments = app.parse_args(["train", str(config), "--name", "alone", "--workers", "1"])[1].arguments
    run_training(arguments["run"], launch=pool.launch)
    np.testing.assert_allclose(_losses(disturbed), _losses(f"{runs}/alone"), rtol=1e-3)


def _with_credentials(cluster: dict[str, str], uri: str, kind: str) -> list[str]:
    """Where the S3 store's key, which every process has, or Ray's token is in what jobs have left.

    The jobs include one of that kind.
    """
    places = {"jobs": _asked(cluster, "/api/jobs/")}
    # Ray's folder: its logs, the jobs' logs, and what was uploaded, as unpacked on each node.
    for path in Path(cluster["folder"]).rglob("*"):
        if path.is_file() and not path.is_symlink():
            places[str(path)] = path.read_bytes()
    for info in storage.listing(uri):
        places[info.path] = storage.read(f"s3://{info.path}") or b""
    for line in diptych("jobs", "list").stdout.splitlines()[1:]:
        if line.startswith(kind):
            places[line] = diptych("jobs", "show", line.split()[0]).stdout.encode()
    # What is looked for would be found.
    assert f'"{kind}-'.encode() in places["jobs"]
    assert any(f"job-driver-{kind}" in place for place in places)
    assert any(place.endswith("report.html") for place in places)
    assert any(b"window_rows" in content for content in places.values())
    secrets = (os.environ["AWS_SECRET_ACCESS_KEY"].encode(), _token().encode())
    return [place for place, content in places.items() if any(secret in content for secret in secrets)]


def test_no_credential_is_in_what_a_run_as_a_job_sends_prints_or_leaves(
    cluster: dict[str, str], disturbed: str
) -> None:
    assert _with_credentials(cluster, disturbed, "train") == []


@pytest.mark.slow
def test_a_search_is_submitted_as_a_run_is_and_leaves_no_credential_either(
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
    assert _with_credentials(cluster, f"{runs}/search", "tune") == []


@pytest.mark.slow
def test_a_run_that_is_no_job_is_spread_over_its_nodes(cluster: dict[str, str], tmp_path: Path) -> None:
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


def test_a_job_that_knows_of_its_relative_path_alone_fails_and_its_exit_code_is_submit_s(
    cluster: dict[str, str], images: str
) -> None:
    failed = diptych("submit", "--", "data", "pack", images, "packed")
    assert failed.returncode == 2
    assert "diptych: packed is a path in the job's own folder" in failed.stdout
    (job,) = re.findall(r"^job (\S+):", failed.stderr, re.M)
    listed = diptych("jobs", "list").stdout
    (line,) = (line for line in listed.splitlines() if line.startswith(job))
    assert line.split()[1] == "FAILED"
    assert line.endswith(f"diptych data pack {images} packed")
    assert "diptych-probe" not in listed
    assert "exit code  2\n" in diptych("jobs", "show", job).stdout
    unknown = diptych("jobs", "show", "nix")
    assert (unknown.returncode, unknown.stderr) == (
        2, f"diptych: no job 'nix' at {cluster['dashboard']}; diptych jobs list shows the IDs\n"
    )  # fmt: skip


def test_a_dry_run_lists_what_would_be_sent_and_sends_no_job(cluster: dict[str, str], config: Path) -> None:
    def jobs() -> list[str]:
        # On a slow machine Ray writes the status of a job once more after the job was deleted.
        names = (str(job["submission_id"]) for job in json.loads(_asked(cluster, "/api/jobs/")))
        return [name for name in names if not name.startswith("diptych-probe")]

    before = jobs()
    shown = diptych("submit", "--dry-run", "--", "train", str(config))
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines() == [
        f"{cluster['dashboard']}: the cluster has this diptych: nothing is installed",
        f"{config.stat().st_size:>9,}  small.toml",
        f"{config.stat().st_size:>9,}  bytes in 1 files would be sent",
        "runs: exec python -m cluster train small.toml",
    ]
    assert jobs() == before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "demo", "--data.train", "i"], "--data.train i is a path in the job's own folder"),
        (["train", "demo", "--data.train", "/i"], "--output runs is a path in the job's own folder"),
        (
            ["train", "demo", "--data.train", "/i", "--data.test", "t", "--output", "/o"],
            "--data.test t is a path in the job's own folder",
        ),
        (["train", "demo", "--data.train", "/i", "--bach-size", "3"], "Unknown option: --bach-size"),
        (["train", "demo", "--data.train", "s3://key:secret@b/c"], "the s3:// URI carries credentials"),
        (["cluster", "down"], "cluster cannot be submitted; write: diptych submit -- train CONFIG --flags"),
        ([], "nothing cannot be submitted"),
    ],
)
def test_what_is_wrong_with_a_command_shows_before_it_is_sent(
    command: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["submit", "--address", "http://127.0.0.1:1", "--", *command])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_its_nodes_are_listed_and_a_second_cluster_is_refused(
    cluster: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    listed = diptych("cluster", "status")
    assert listed.returncode == 0, listed.stderr
    assert cluster["address"] in listed.stdout
    # A dead node is listed too.
    assert len(re.findall(" (?:alive|dead) ", listed.stdout)) == 3
    assert " alive " in listed.stdout
    with pytest.raises(SystemExit) as stopped:
        main(["cluster", "up"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        f"diptych: a cluster is already running at {cluster['address']}; diptych cluster down ends it\n"
    )


def test_it_listens_on_the_loopback_address_alone(cluster: dict[str, str]) -> None:
    found = listening(cluster_processes(f"DIPTYCH_CLUSTER={cluster['mark']}", cluster["folder"]))
    assert {address for addresses in found.values() for address in addresses} == LOOPBACK


def test_rays_own_way_to_a_cluster_is_left_as_it_was(cluster: dict[str, str]) -> None:
    assert Path(cluster["rays"]).read_text() == "another's"
    named = Path("/tmp/ray/ray_current_cluster")
    assert not named.exists() or named.read_text().strip() != cluster["address"]


def test_without_the_token_it_is_closed(cluster: dict[str, str], elsewhere: str) -> None:
    for method, token, code in (("GET", "", 401), ("POST", "", 401), ("POST", "0" * 32, 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            _asked(cluster, "/api/jobs/", method, token)
        assert refused.value.code == code
        refused.value.close()
    # Ray tries 20 times, a second apart, unless told otherwise.
    stranger = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32, "RAY_NUM_REDIS_GET_RETRIES": "2"}
    for command, there, state in (
        (["cluster", "status"], cluster["address"], {}),
        (
            ["jobs", "list", "--address", cluster["dashboard"]],
            cluster["dashboard"],
            {"XDG_STATE_HOME": elsewhere},
        ),
    ):
        turned_away = diptych(*command, **stranger, **state)
        assert turned_away.returncode == 2
        assert f"the Ray cluster at {there} requires its token" in turned_away.stderr


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


def test_requests_that_are_not_answered_end_and_a_client_of_another_kind_is_left_as_it_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = SubmissionClient(f"http://127.0.0.1:{silent.getsockname()[1]}")
        limit_answers(client, 0.2)
        with pytest.raises(requests.Timeout):
            client.get_version()
    limit_answers(object(), 0.2)


@pytest.fixture(scope="module")
def examined(cluster: dict[str, str], bucket: str, elsewhere: str) -> list[str]:
    """Output of `submit` for a doctor's job, before and after the connection to the cluster is cut."""
    relay = _Relay(int(cluster["dashboard"].rpartition(":")[2]))
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster", "submit", "--address", f"http://127.0.0.1:{relay.port}"]
        + ["--", "doctor", "--storage", f"{bucket}/doctor", "--workers", "2"],
        env=os.environ | {"RAY_AUTH_MODE": "token", "XDG_STATE_HOME": elsewhere},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    first = next(line for line in process.stdout if line.startswith("Running entrypoint"))
    assert relay.cut() > 0
    rest = process.stdout.read()
    assert process.wait(300) == 0, rest
    relay.close()
    process.stdout.close()
    return [first, rest]


def test_a_connection_that_is_lost_is_made_again_and_each_line_is_shown_once(examined: list[str]) -> None:
    first, rest = examined
    assert first not in rest
    assert rest.count("gradient self-test") == rest.count("this cluster can train") == 1


def test_a_cluster_that_can_train_passes_every_check_of_doctor(examined: list[str], bucket: str) -> None:
    shown = "".join(examined).partition("cluster at ")[2]
    assert shown.endswith("this cluster can train\n")
    levels = {line.split()[0] for line in shown.splitlines()[2:-1] if line.strip() and line[0] != " "}
    assert levels == {"ok"}
    for check in ("versions", "CPUs, GPUs", "memory", "object store", "DALI on the CPU", "clock", "storage"):
        assert check in shown
    assert re.search("exact step on the CPU +every node +the same bits", shown)
    for told in ("2 on 2 node(s), gloo", "views within 0e+00", "GB/s into each worker", "MB/s, read"):
        assert told in shown
    assert storage.names(f"{bucket}/doctor") == []
