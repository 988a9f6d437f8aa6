"""Checkpoints written beside training: copies, one at a time, and what a storage that refuses costs."""

import os
import resource
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import storage
from training.checkpoint import Checkpoints
from training.errors import UnsavedError
from training.saver import Saver


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def saver(tmp_path: Path, warnings: list[str]) -> Saver:
    return Saver(Checkpoints(str(tmp_path), keep=2), warnings.append)


class _Late(Checkpoints):
    """Writes once the training has moved on."""

    moved_on = threading.Event()

    def write(self, *arguments: Any, **others: Any) -> None:
        assert self.moved_on.wait(30)
        super().write(*arguments, **others)


def test_what_is_written_is_what_there_was_when_it_was_handed_over(tmp_path: Path) -> None:
    checkpoints = _Late(str(tmp_path), keep=2)
    saver = Saver(checkpoints, pytest.fail)
    weights = torch.ones(3)
    saver.save(1, {"model": {"weight": weights}, "list": [weights], "step": 1, "config": {}})
    weights.fill_(2)
    checkpoints.moved_on.set()
    assert saver.wait()
    saved = checkpoints.load(1)
    assert torch.equal(saved["model"]["weight"], torch.ones(3))
    assert torch.equal(saved["list"][0], torch.ones(3))


def test_the_newest_and_the_best_stay(saver: Saver, tmp_path: Path) -> None:
    for step, score in enumerate((None, 0.3, None, None, 0.2, None), start=1):
        saver.save(step, {"step": step}, score=score if score == 0.3 else None)
    saver.wait()
    checkpoints = Checkpoints(str(tmp_path), keep=2)
    names = storage.names(str(tmp_path / "checkpoints"))
    assert names == ["best.json", *(f"step-{step:09}.pt" for step in (2, 5, 6))]
    assert checkpoints.best() == (2, 0.3)
    assert checkpoints.latest_step() == 6
    checkpoints.write(7, {"step": 7}, score=0.4)
    assert storage.names(str(tmp_path / "checkpoints"))[1:] == ["step-000000006.pt", "step-000000007.pt"]


def _state(step: int) -> dict[str, Any]:
    return {"step": step, "model": {"weight": torch.full((3,), float(step))}, "config": {}}


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in (folder / "checkpoints").glob("step-*.pt") if path.is_file())


@contextmanager
def _blocked(folder: Path, step: int) -> Iterator[None]:
    """Where the checkpoint of the step shall go there is a folder that is not empty."""
    blocked = folder / "checkpoints" / f"step-{step:09}.pt"
    (blocked / "inside").mkdir(parents=True)
    yield
    shutil.rmtree(blocked)


def test_one_that_was_refused_is_told_once_and_written_as_it_was(tmp_path: Path, warnings: list[str]) -> None:
    saver = Saver(Checkpoints(str(tmp_path), keep=2), warnings.append, whole=0, retry_seconds=0.0)
    weights = torch.ones(3)
    with _blocked(tmp_path, 2):
        saver.save(2, {"step": 2, "model": {"weight": weights}, "config": {}})
        weights.fill_(7)
        assert not saver.wait()
        for _ in range(3):
            saver.look()
            assert not saver.wait()
        assert saver.failed_saves == 1
        (warning,) = warnings
        assert warning.startswith("the checkpoint of step 2 could not be written: [Errno ")
        assert warning.endswith("; that of step 0 is complete; the write is retried")
    saver.look()
    assert saver.wait()
    assert torch.equal(Checkpoints(str(tmp_path), 2).load(2)["model"]["weight"], torch.ones(3))
    assert warnings[1:] == ["checkpoints can be written again: that of step 2 is complete"]
    assert (saver.whole, saver.failed_saves, saver.fault) == (2, 0, None)


def test_nothing_is_tried_again_before_its_time(tmp_path: Path, warnings: list[str]) -> None:
    saver = Saver(Checkpoints(str(tmp_path), keep=2), warnings.append, retry_seconds=3600)
    with _blocked(tmp_path, 2):
        saver.save(2, _state(2))
        assert not saver.wait()
    saver.look()
    assert not saver.wait()
    assert _steps(tmp_path) == []
    saver.insist(60)  # That does.
    assert _steps(tmp_path) == [2]


def test_the_newest_takes_the_place_of_one_that_was_refused_and_the_best_is_kept(
    tmp_path: Path, warnings: list[str]
) -> None:
    saver = Saver(Checkpoints(str(tmp_path), keep=1), warnings.append)
    (tmp_path / "checkpoints").touch()
    for step, score in ((1, None), (2, 0.5), (3, None), (4, None)):
        saver.save(step, _state(step), score=score)
        assert not saver.wait()
    assert saver.failed_saves == 4
    assert [warning[:24] for warning in warnings] == [
        f"the checkpoint of step {step}" for step in (1, 2, 3, 4)
    ]
    (tmp_path / "checkpoints").unlink()
    saver.insist(60)
    assert _steps(tmp_path) == [2, 4]
    assert Checkpoints(str(tmp_path), keep=1).best() == (2, 0.5)


def test_a_storage_that_refuses_for_too_long_ends_it_with_the_newest_whole_one(
    tmp_path: Path, warnings: list[str]
) -> None:
    saver = Saver(Checkpoints(str(tmp_path), keep=2), warnings.append)
    saver.save(1, _state(1))
    saver.save(2, _state(2))
    assert saver.wait()
    (tmp_path / "checkpoints" / "step-000000002.pt").write_bytes(b"torn")
    with _blocked(tmp_path, 3):
        saver.save(3, _state(3))
        with pytest.raises(
            UnsavedError,
            match=r"^no checkpoint could be written for 0.1 s: \[Errno .*step-000000003.pt'; that of step "
            rf"1 is complete; .*, then: diptych train --resume {tmp_path}$",
        ):
            saver.insist(0.1)


def test_a_disk_that_is_full_keeps_the_older_one_and_no_part_of_the_new_one(
    saver: Saver, tmp_path: Path, warnings: list[str]
) -> None:
    saver.save(1, _state(1))
    assert saver.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # To who writes it is the same: so many bytes are taken, and no more.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        saver.save(2, {"step": 2, "weights": torch.zeros(1_000_000)})
        assert not saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert warnings[0].startswith("the checkpoint of step 2 could not be written: ")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000001.pt"]
    saver.insist(60)
    assert _steps(tmp_path) == [1, 2]


def test_a_process_that_may_open_no_more_files_tries_again(
    saver: Saver, tmp_path: Path, warnings: list[str]
) -> None:
    saver.save(1, _state(1))  # Its thread and what it imports are there from now on.
    assert saver.wait()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        saver.save(2, _state(2))
        assert not saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "oo many open files" in warnings[0]
    assert storage.way_out(saver.fault or OSError()) == "raise the limit of open files, as in ulimit -n 4096"
    saver.insist(60)
    assert _steps(tmp_path) == [1, 2]


@pytest.mark.skipif(os.getuid() != 0, reason="taking another user's place needs root")
def test_a_folder_that_becomes_another_users_is_told(warnings: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="diptych-") as folder:
        run = Path(folder, "run")
        run.mkdir()
        for path in (Path(folder), run):
            path.chmod(0o755)
        saver = Saver(Checkpoints(str(run), keep=2), warnings.append)
        saver.save(1, _state(1))
        assert saver.wait()
        os.seteuid(65534)
        try:
            saver.save(2, _state(2))
            assert not saver.wait()
        finally:
            os.seteuid(0)
        assert "[Errno 13] Permission denied" in warnings[0]
        assert storage.way_out(saver.fault or OSError()) == "give this user the permission"
        saver.insist(60)
        assert _steps(run) == [1, 2]


def test_what_a_killed_process_has_left_of_a_write_is_removed(saver: Saver, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    left, other = folder / f".step-000000007.pt.{'0f' * 16}.partial", folder / "a file of the user's"
    for path in (left, other):
        path.write_bytes(b"half of it")
    saver.save(8, _state(8))
    assert saver.wait()
    assert not left.exists()
    assert other.exists()


def test_checkpoints_that_cannot_be_deleted_cost_no_save(
    tmp_path: Path, warnings: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    saver = Saver(Checkpoints(str(tmp_path), keep=1), warnings.append)
    saver.save(1, _state(1))
    assert saver.wait()
    one = tmp_path / "checkpoints" / "step-000000001.pt"
    made = subprocess.run(["chattr", "+i", one], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("no file can be made immutable here")
    try:
        for step in (2, 3):
            saver.save(step, _state(step))
            assert saver.wait()
    finally:
        subprocess.run(["chattr", "-i", one], check=True)
    assert not warnings
    assert [text[:40] for text in caplog.messages] == ["older checkpoints could not be deleted: "]
    saver.save(4, _state(4))
    assert saver.wait()
    assert _steps(tmp_path) == [4]
