"""One process at a time trains a run: those that have ended, and those that have not."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from flips import flips
from leases import held_there, holder, taken_over
from proxy import proxied
from small_digits import write_small_digits

from cluster.objectstore import S3Server
from pipelines import storage
from pipelines.config import RECIPES, DataConfig
from pipelines.index import build_index
from pipelines.reader import read_windows
from pipelines.storage.checksums import checked_json, json_with_checksum
from training import lease
from training.checkpoint import Checkpoints
from training.config import TrainConfig
from training.errors import UnsavedError
from training.evaluation.evaluator import Sets
from training.gather import LocalGather
from training.lease import leased
from training.process import Worker
from training.trainer import run_uri, train


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    with (
        holder(folder) as first,
        pytest.raises(ValueError, match=rf"{folder} is being written by process {first.pid} on "),
        leased(folder, Event()),
    ):
        pass
    with leased(folder, Event()):
        assert storage.names(folder) == ["lease.json"]
    assert storage.names(folder) == []


def test_one_that_was_killed_leaves_its_place_at_once_on_its_own_machine(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    with holder(folder) as first:
        first.kill()
        first.wait()
        with leased(folder, Event()):
            pass


def test_elsewhere_one_that_is_renewed_is_refused_and_one_that_is_not_expires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(lease, "_EXPIRY_SECONDS", 0.5)
    with holder(str(tmp_path), "another machine") as first:
        with pytest.raises(ValueError, match="is being written"), leased(str(tmp_path), Event()):
            pass
        first.kill()
        first.wait()
        with leased(str(tmp_path), Event()):
            pass
    assert storage.names(str(tmp_path)) == []


def test_whoever_loses_its_lease_hears_of_it_and_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.05)
    taken = Event()
    with leased(str(tmp_path), taken):
        assert not taken.is_set()
        values = checked_json((tmp_path / "lease.json").read_bytes())
        (tmp_path / "lease.json").write_text(json_with_checksum(values | {"key": "another's"}))
        assert taken.wait(60)
    assert json.loads((tmp_path / "lease.json").read_text())["key"] == "another's"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"cannot write .*file/run: .*; choose another --output"),
        leased(str(tmp_path / "file" / "run"), Event()),
    ):
        pass


def test_a_lease_that_is_gone_was_another_process_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.05)
    folder, taken = str(tmp_path / "run"), Event()
    with leased(folder, taken):
        assert not taken.wait(0.3)
        for _ in range(600):  # It may come back once: from a renewal that had just looked.
            # As one that has taken it over does at its end.
            (tmp_path / "run" / "lease.json").unlink(missing_ok=True)
            if taken.wait(0.1):
                break
        assert taken.is_set()


def test_a_lease_that_could_not_be_removed_hinders_nobody_of_the_same_process(tmp_path: Path) -> None:
    folder, place = str(tmp_path / "run"), tmp_path / "run" / "lease.json"
    with leased(folder, Event()):
        left = place.read_bytes()
    place.write_bytes(left)
    with leased(folder, Event()):
        pass
    assert not place.exists()


@pytest.mark.parametrize("renewed", [None, "now"])
def test_what_is_no_lease_expires(tmp_path: Path, renewed: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(lease, "_EXPIRY_SECONDS", 0.2)
    folder, place = str(tmp_path / "run"), tmp_path / "run" / "lease.json"
    with leased(folder, Event()):
        values = json.loads(place.read_bytes())
    place.write_text(json.dumps(values | {"renewed": renewed}))
    with leased(folder, Event()):
        pass


def test_a_flipped_bit_neither_ends_the_holder_nor_lets_another_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.2)
    monkeypatch.setattr(lease, "_LOOK_SECONDS", 0.05)
    folder, place, taken = str(tmp_path / "run"), tmp_path / "run" / "lease.json", Event()
    with leased(folder, taken) as held:
        whole = place.read_bytes()
        for harmed in flips(whole, range(0, 8 * len(whole), 7)):
            place.write_bytes(harmed)
            held.check()
        place.write_bytes(b"")
        held.check()
        with pytest.raises(ValueError, match="is being written by process"), leased(folder, Event()):
            pass
        assert not taken.is_set()
        held.check()


def _killed_write(place: Path) -> Path:
    """What a process leaves that is killed in the middle of a write of the file."""
    before = set(place.parent.glob(".*"))
    write = (
        "import resource, signal, sys; from pipelines import storage;"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0));"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY));"
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL); storage.write(sys.argv[1], bytes(5000))"
    )
    done = subprocess.run([sys.executable, "-c", write, place], check=False)
    assert done.returncode == -signal.SIGXFSZ
    (left,) = set(place.parent.glob(".*")) - before
    return left


def test_whoever_takes_it_removes_what_killed_writers_have_left_and_nothing_that_may_be_in_use(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    names = (
        "metrics.jsonl",
        "index/train.parquet",
        "lease.json",
        "checkpoints/step-000000002.pt",
        "report.html",
    )
    *old, new = [_killed_write(folder / name) for name in names]
    users = folder / ".notes.partial"
    users.write_text("a file of the user's")
    hour_ago = time.time() - 3600
    for path in (*old[:2], users):
        os.utime(path, (hour_ago, hour_ago))
    with leased(str(folder), Event()):
        assert [path for path in old if path.exists()] == []
        assert new.exists()
        assert users.exists()
    os.utime(new, (hour_ago, hour_ago))
    with leased(str(folder), Event()):
        assert not new.exists()


def test_one_that_cannot_be_settled_hinders_no_later_try_of_the_same_process(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = f"{bucket}/{uuid.uuid4().hex}"
    with proxied(s3.variables["AWS_ENDPOINT_URL"], monkeypatch) as proxy:
        # The lease is there, and can no longer be read: a key that expires.
        proxy.fault = lambda method, path, number: (
            "expired" if method != "PUT" and proxy.count("PUT", "lease.json") else None
        )
        with pytest.raises(OSError, match=r"^reading .*lease.json: "), leased(folder, Event()):
            pass
        proxy.fault = lambda method, path, number: None
        with leased(folder, Event()):
            assert storage.names(folder) == ["lease.json"]


def test_workers_of_a_halted_process_write_nothing_once_another_has_taken_its_run_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(lease, "_EXPIRY_SECONDS", 0.5)
    write_small_digits(tmp_path, 49)
    view = replace(RECIPES["simclr-cifar"][0], size=16)
    data = DataConfig(train=str(tmp_path / "train"), view=view, window_rows=12)
    fields: dict[str, Any] = {
        "batch_size": 24, "lanes": 2, "steps": 8, "encoder": {"name": "resnet8"},
        "projector": {"hidden_dim": 32, "dim": 16}, "optimizer": {"name": "sgd", "learning_rate": 0.001},
        "evaluation": {"diagnostic_images": 0}, "checkpoint": {"every_steps": 1, "keep": 2},
    }  # fmt: skip
    config = TrainConfig(data=data, output=str(tmp_path), **fields)
    run, steps = run_uri(config), iter(range(8))
    with holder(run, "another machine") as driver, ExitStack() as later:
        held = held_there(run)
        theirs, half = Checkpoints(run, 2), f"{run}/checkpoints/.step-000000008.pt.{'0' * 32}.partial"

        def take_over() -> bool:
            if next(steps) == 4:  # Asked before the first step, and after each.
                later.enter_context(taken_over(run, driver))
                found = theirs.latest()
                assert found
                theirs.write(7, found | {"step": 7})
                storage.write(f"{run}/metrics.jsonl", b"another's")
                Path(half).touch()  # Of one that the other process is writing.
            return False

        worker = Worker(
            gather=LocalGather(),
            device=torch.device("cpu"),
            threads=1,
            tables=read_windows,
            stopping=take_over,
        )
        sets = Sets(build_index(data.train, data))
        with pytest.raises(UnsavedError, match=rf"^process {os.getpid()} on .* has taken {run} over; wait "):
            train(config, sets, worker, lambda values: None, held=held)
        assert theirs.latest_step() == 7
        assert theirs.load(7)["step"] == 7
        assert not storage.exists(theirs.uri(4))
        assert Path(half).exists()
        assert storage.read(f"{run}/metrics.jsonl") == b"another's"


def test_workers_hear_of_one_that_has_taken_their_run_over_and_has_ended(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    with leased(folder, Event()) as held:
        held.check()
        storage.remove(f"{folder}/lease.json")  # As the other does at its end.
        with pytest.raises(UnsavedError, match=f"^another process has taken {folder} over, and has ended; "):
            held.check()
