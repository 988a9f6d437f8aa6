"""Checkpoints written beside training: copies, one at a time, and what a storage that refuses costs."""

import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import storage
from training.checkpoint import Checkpoints
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


def test_a_storage_that_refuses_costs_one_checkpoint_and_is_told(
    saver: Saver, tmp_path: Path, warnings: list[str]
) -> None:
    saver.save(1, {"step": 1, "model": {}, "config": {}})
    assert saver.wait()
    # Where the next one shall go there is a folder that is not empty.
    blocked = tmp_path / "checkpoints" / "step-000000002.pt"
    (blocked / "inside").mkdir(parents=True)
    saver.save(2, {"step": 2})
    assert not saver.wait()
    assert len(warnings) == 1
    assert warnings[0].startswith("the checkpoint of step 2 could not be written: ")
    assert Checkpoints(str(tmp_path), keep=2).load(1)["step"] == 1
    saver.save(3, {"step": 3, "model": {}, "config": {}})
    assert saver.wait()
    assert Checkpoints(str(tmp_path), keep=2).load(3)["step"] == 3


def test_a_disk_that_is_full_costs_one_checkpoint_and_leaves_no_part_of_it(
    saver: Saver, tmp_path: Path, warnings: list[str]
) -> None:
    saver.save(1, {"step": 1, "model": {}, "config": {}})
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
    assert Checkpoints(str(tmp_path), keep=2).latest_step() == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000001.pt"]
