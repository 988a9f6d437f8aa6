"""Runs whose disk takes no writes for a while or for good: the save is tried again, never the training."""

import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_digits import small_digits, write_small_digits
from small_disks import Full, Harm, NoInodes, ReadOnly, Unmounted, small_disk
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pipelines.config import RECIPES, DataConfig
from pipelines.index import build_index
from pipelines.reader import read_windows
from pipelines.shards import write_shards
from training.checkpoint import Checkpoints
from training.config import TrainConfig
from training.errors import StoppedError, UnsavedError
from training.evaluation.evaluator import Sets
from training.gather import LocalGather, ProcessGroupGather
from training.metrics import read_metrics
from training.objectives import Objective
from training.process import Worker
from training.trainer import run_uri, train

_STEPS = 8
_HARMS: dict[str, type[Harm]] = {
    "full": Full, "no inodes": NoInodes, "read-only": ReadOnly, "unmounted": Unmounted,
}  # fmt: skip

# What the run says as its first save fails, and as it no longer trains.
_FIRST_FAILURE, _PAUSE = "the checkpoint of step ", "the run waits up to "


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("digits")
    write_small_digits(folder, 49)
    view = replace(RECIPES["simclr-cifar"][0], size=16)
    return DataConfig(train=str(folder / "train"), view=view, window_rows=12)


def _config(data: DataConfig, output: Path, **fields: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "batch_size": 24, "lanes": 2, "steps": _STEPS, "temperature": 1.0, "encoder": {"name": "resnet8"},
        "projector": {"hidden_dim": 32, "dim": 16}, "optimizer": {"name": "sgd", "learning_rate": 0.001},
        "evaluation": {"diagnostic_images": 4}, "checkpoint": {"every_steps": 1, "keep": 2},
    }  # fmt: skip
    return TrainConfig(data=data, output=str(output), **{**settings, **fields})


def _train(
    config: TrainConfig,
    stopping: Callable[[], bool] = lambda: False,
    hear: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Train in this process, or as the rank that it is; the warnings, which `hear` is told too."""
    said: list[str] = []

    def progress(values: dict[str, Any]) -> None:
        if "warning" in values:
            said.append(values["warning"])
            hear(said[-1])

    several = dist.is_initialized() and dist.get_world_size() > 1
    gather = ProcessGroupGather() if several else LocalGather()
    cpu = torch.device("cpu")
    worker = Worker(gather=gather, device=cpu, threads=1, tables=read_windows, stopping=stopping)
    train(config, Sets(build_index(config.data.train, config.data)), worker, progress)
    return said


def _begin(harm: Harm, config: TrainConfig, after: int) -> None:
    """Harm the disk once the checkpoint of the step `after` is there: a thread writes it."""
    checkpoint = Path(Checkpoints(run_uri(config), 2).uri(after))
    deadline = time.monotonic() + 60
    while config.checkpoint.every_steps == 1 and not checkpoint.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    harm.begin()


@contextmanager
def _before_step(step: int, act: Callable[[], None]) -> Iterator[list[int]]:
    """Act before so manieth a step is trained; yields a list that gets an entry for each."""
    trained: list[int] = []

    def count(module: nn.Module, _inputs: Any) -> None:
        if isinstance(module, Objective):
            trained.append(len(trained) + 1)
            if len(trained) == step:
                act()

    hook = register_module_forward_pre_hook(count)
    try:
        yield trained
    finally:
        hook.remove()


def _train_disturbed(
    config: TrainConfig, harm: str, at: int, until: str, stopping: Callable[[], bool] = lambda: False
) -> int:
    """Train while the disk is harmed from a step on until the run says something; the steps trained."""
    harmed, lasting = _HARMS[harm](Path(config.output)), Event()

    def begin() -> None:
        if not dist.is_initialized() or dist.get_rank() == 0:
            _begin(harmed, config, at - 1)
            lasting.set()

    def hear(warning: str) -> None:
        if lasting.is_set() and warning.startswith(until):
            harmed.end()
            lasting.clear()

    with _before_step(at, begin) as trained:
        _train(config, stopping, hear)
    assert not lasting.is_set()
    return len(trained)


@pytest.fixture(scope="module")
def whole(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run to which nothing happens."""
    config = _config(data, tmp_path_factory.mktemp("whole"))
    _train(config)
    return config


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "size=8m,nr_inodes=200") as folder:
        yield folder


def _saved(config: TrainConfig) -> list[int]:
    """Steps of the checkpoints that are there."""
    return sorted(int(path.stem[5:]) for path in Path(run_uri(config), "checkpoints").glob("*.pt"))


def _assert_same(config: TrainConfig, other: TrainConfig) -> None:
    """The weights bit for bit, and each step once."""
    ours, theirs = (Checkpoints(run_uri(run), 2).load(_STEPS) for run in (config, other))
    for part in ("model", "optimizer"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
    lines, others = ([line for line in _lines(run) if "loss" in line] for run in (config, other))
    assert [line["step"] for line in lines] == list(range(1, _STEPS + 1))
    assert [line["loss"] for line in lines] == [line["loss"] for line in others]


def _lines(config: TrainConfig) -> list[dict[str, Any]]:
    return read_metrics(run_uri(config))


def _warnings(config: TrainConfig) -> list[str]:
    return [line["warning"] for line in _lines(config) if "warning" in line]


@pytest.mark.parametrize("until", [_FIRST_FAILURE, _PAUSE])
@pytest.mark.parametrize("harm", _HARMS)
def test_a_disk_that_takes_no_writes_for_a_while_costs_nothing(
    harm: str, until: str, data: DataConfig, whole: TrainConfig, disk: Path
) -> None:
    config = _config(data, disk)
    assert _train_disturbed(config, harm, 3, until) == _STEPS
    _assert_same(config, whole)
    assert _saved(config) == [_STEPS - 1, _STEPS]
    said = _warnings(config)
    first = next(text for text in said if text.startswith(_FIRST_FAILURE))
    assert first.startswith("the checkpoint of step 3 could not be written: [Errno ")
    assert first.endswith("; that of step 2 is complete; the write is retried")
    assert sum(text.startswith("checkpoints can be written again: that of step ") for text in said) == 1
    assert any(text.startswith(_PAUSE) for text in said) == (until == _PAUSE)


@pytest.mark.parametrize(
    ("harm", "reason", "way_out"),
    [
        ("full", "No space left on device", "free space there"),
        ("no inodes", "No space left on device", "delete small files there"),
        ("read-only", "Read-only file system", "mount it so that it can be written"),
        ("unmounted", "the folder has vanished", "bring it back, or mount its disk again"),
    ],
)
def test_one_that_takes_none_for_long_ends_the_run_which_resumes_as_if_nothing_had_been(
    harm: str, reason: str, way_out: str, data: DataConfig, whole: TrainConfig, disk: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("DIPTYCH_STORAGE_TIMEOUT", "0.5")
    config, harmed = _config(data, disk), _HARMS[harm](disk)
    begin = partial(_begin, harmed, config, 2)
    with _before_step(3, begin) as trained, pytest.raises(UnsavedError) as ended:
        _train(config)
    start, end = str(ended.value).split("; that of step 2 is complete; ")
    assert start.startswith("no checkpoint could be written for 0.5 s: [Errno ")
    assert reason in start
    assert end == f"{way_out}, then: diptych train --resume {run_uri(config)}"
    assert len(trained) < _STEPS
    harmed.end()
    assert _saved(config) == [1, 2]
    _train(config)
    _assert_same(config, whole)


def test_the_last_checkpoint_is_written_once_there_is_room_and_no_step_is_trained_again(
    data: DataConfig, whole: TrainConfig, disk: Path
) -> None:
    config = _config(data, disk, checkpoint={"every_steps": 100, "keep": 2})
    assert _train_disturbed(config, "full", _STEPS, _PAUSE) == _STEPS
    _assert_same(config, whole)


def test_two_ranks_wait_together(data: DataConfig, run_ranks: Callable, disk: Path, tmp_path: Path) -> None:
    config, other = _config(data, disk), _config(data, tmp_path / "other")
    run_ranks(_train, 2, other)
    assert run_ranks(_train_disturbed, 2, config, "full", 3, _PAUSE) == [_STEPS, _STEPS]
    _assert_same(config, other)


def test_older_checkpoints_stay_where_the_disk_has_no_room_for_one_more(
    data: DataConfig, whole: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIPTYCH_STORAGE_TIMEOUT", "0.5")
    checkpoint = Path(run_uri(whole), "checkpoints", f"step-{_STEPS:09}.pt").stat().st_size
    with small_disk(tmp_path / "disk", f"size={int(2.7 * checkpoint)}") as disk:
        config = _config(data, disk)
        with pytest.raises(UnsavedError, match="that of step 2 is complete; free space there, then: diptych"):
            _train(config)
        assert _saved(config) == [1, 2]
        for step in (1, 2):
            assert Checkpoints(run_uri(config), 2).load(step)["step"] == step


def test_stopped_while_the_disk_is_full_it_saves_once_there_is_room(
    data: DataConfig, whole: TrainConfig, disk: Path
) -> None:
    config = _config(data, disk)
    asked = chain([False] * 4, repeat(True))  # Before the first step, and after each.
    with pytest.raises(StoppedError, match="stopped after step 4"):
        _train_disturbed(config, "full", 3, _PAUSE, lambda: next(asked))
    assert _saved(config)[-1] == 4
    _train(config)
    _assert_same(config, whole)


def _train_until_killed_in_a_write(config: TrainConfig) -> None:
    def limit() -> None:
        # The kernel ends the process in the middle of the next file that is larger; Python ignores it else.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    with _before_step(5, limit):
        _train(config)


def test_killed_in_the_middle_of_a_save_it_resumes_and_clears_that_away(
    data: DataConfig, whole: TrainConfig, run_ranks: Callable, tmp_path: Path
) -> None:
    config = _config(data, tmp_path)
    with pytest.raises(RuntimeError, match="its process died"):
        run_ranks(_train_until_killed_in_a_write, 1, config)
    folder = tmp_path / "run" / "checkpoints"
    (partial_file,) = folder.glob(".*.partial")
    assert 0 < partial_file.stat().st_size <= 100_000
    assert 3 <= _saved(config)[-1] <= 5
    _train(config)
    _assert_same(config, whole)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000007.pt", "step-000000008.pt"]


def test_stopped_before_the_first_step_it_leaves_at_once_and_resumes(
    data: DataConfig, whole: TrainConfig, tmp_path: Path
) -> None:
    config = _config(data, tmp_path)
    with pytest.raises(StoppedError, match="stopped after step 0"):
        _train(config, lambda: True)
    assert not (tmp_path / "run" / "checkpoints").exists()
    _train(config)
    _assert_same(config, whole)


_PEOPLES = ("metrics.jsonl", "views.png", "quarantine.jsonl", "tensorboard")


@pytest.fixture(scope="module")
def broken(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """The same digits, one of them cut off."""
    folder = tmp_path_factory.mktemp("broken")
    rows = list(small_digits(0, 49))
    rows[7] = rows[7][0][:-30], *rows[7][1:]
    write_shards(iter(rows), str(folder), rows_per_shard=60, rows_per_group=25)
    return replace(data, train=str(folder), max_bad_share=0.1)


def _block(run: Path, names: Iterable[str]) -> None:
    """Put things in the place of a run's files that keep them from being written."""
    for name in names:
        if (run / name).is_file():
            (run / name).unlink()
        if name == "tensorboard":
            shutil.rmtree(run / name, ignore_errors=True)
            (run / name).touch()
        else:
            (run / name / "inside").mkdir(parents=True)


def _clear(run: Path, names: Iterable[str]) -> None:
    for name in names:
        (run / name).unlink() if name == "tensorboard" else shutil.rmtree(run / name)


@pytest.mark.parametrize("name", _PEOPLES)
def test_a_file_for_people_that_cannot_be_written_ends_no_step_and_is_told(
    name: str, broken: DataConfig, tmp_path: Path
) -> None:
    config = _config(broken, tmp_path)
    (tmp_path / "run").mkdir()
    _block(tmp_path / "run", [name])
    first, last = _train(config)
    assert first.startswith(f"{name} could not be written: [Errno ")
    assert first.endswith("; it is tried again")
    assert last == f"{run_uri(config)} is complete but for {name}"
    assert _saved(config) == [_STEPS - 1, _STEPS]


def test_files_for_people_are_whole_once_they_can_be_written(broken: DataConfig, tmp_path: Path) -> None:
    config, run = _config(broken, tmp_path), tmp_path / "run"
    run.mkdir()
    _block(run, _PEOPLES)
    with _before_step(5, lambda: _clear(run, _PEOPLES)):
        said = _train(config)
    assert sorted(text.partition(" ")[0] for text in said) == sorted(_PEOPLES)
    assert [line["step"] for line in _lines(config) if "loss" in line] == list(range(1, _STEPS + 1))
    assert (run / "views.png").read_bytes().startswith(b"\x89PNG")
    assert "digit-7" in (run / "quarantine.jsonl").read_text()
    (events,) = (run / "tensorboard").iterdir()
    assert events.stat().st_size > 0


def test_a_resume_says_which_steps_the_metrics_lack(data: DataConfig, tmp_path: Path) -> None:
    config, run = _config(data, tmp_path), tmp_path / "run"
    asked = chain([False] * 5, repeat(True))
    kept = run.with_name("kept")

    def block() -> None:
        (run / "metrics.jsonl").rename(kept)
        _block(run, ["metrics.jsonl"])

    with _before_step(3, block), pytest.raises(StoppedError, match="after step 5"):
        _train(config, lambda: next(asked))
    _clear(run, ["metrics.jsonl"])
    kept.rename(run / "metrics.jsonl")
    assert _train(config) == ["metrics.jsonl lacks steps 3 to 5: they could not be written"]
    assert [line["step"] for line in _lines(config) if "loss" in line] == [1, 2, 6, 7, 8]
    assert _saved(config) == [_STEPS - 1, _STEPS]
