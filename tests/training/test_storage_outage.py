"""A run whose storage is away: it waits for that once, and no longer than the other ranks wait for rank 0."""

import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from proxy import proxied
from small_digits import write_small_digits

from cluster.objectstore import S3Server
from pipelines import storage
from pipelines.config import RECIPES, DataConfig
from pipelines.index import build_index
from pipelines.reader import read_windows
from training.checkpoint import Checkpoints
from training.config import TrainConfig
from training.errors import UnsavedError
from training.evaluation.evaluator import Sets
from training.gather import LocalGather, ProcessGroupGather
from training.metrics import read_metrics
from training.process import Worker
from training.trainer import run_uri, train

_STEPS = 8

# The ranks hear nothing of each other for so long before they give up: less than two patiences.
_PATIENCE_SECONDS, _RANKS_SECONDS = 20.0, 35.0


@pytest.fixture
def config(bucket: str, tmp_path: Path) -> TrainConfig:
    """Images on this machine, the run in a bucket."""
    write_small_digits(tmp_path, 49)
    view = replace(RECIPES["simclr-cifar"][0], size=16)
    return TrainConfig(
        data=DataConfig(train=str(tmp_path / "train"), view=view, window_rows=12),
        output=f"{bucket}/{uuid.uuid4().hex}",
        **{
            "batch_size": 24, "lanes": 2, "steps": _STEPS, "encoder": {"name": "resnet8"},
            "projector": {"hidden_dim": 32, "dim": 16}, "optimizer": {"name": "sgd", "learning_rate": 0.001},
            "evaluation": {"diagnostic_images": 0}, "checkpoint": {"every_steps": 1, "keep": 2},
        },
    )  # fmt: skip


def _train(config: TrainConfig, away: Path, back: str) -> list[str]:
    """Train while there is a file `away`, from step 2 until the run says what `back` begins; the warnings."""
    said: list[str] = []
    steps = iter(range(_STEPS + 1))

    def stopping() -> bool:
        if next(steps) == 2:  # Asked before the first step, and after each.
            while not storage.exists(Checkpoints(run_uri(config), 2).uri(1)):
                time.sleep(0.05)
            away.touch()
        return False

    def progress(values: dict[str, Any]) -> None:
        if "warning" in values:
            said.append(values["warning"])
            if said[-1].startswith(back):
                away.unlink(missing_ok=True)

    gather = ProcessGroupGather() if dist.is_initialized() else LocalGather()
    cpu = torch.device("cpu")
    worker = Worker(gather=gather, device=cpu, threads=1, tables=read_windows, stopping=stopping)
    train(config, Sets(build_index(config.data.train, config.data)), worker, progress)
    return said


def _train_as_rank(config: TrainConfig, away: Path, back: str, environment: dict[str, str]) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:  # The rank's process stays for other tests.
        for name, value in environment.items():
            patch.setenv(name, value)
        return _train(config, away, back)


def test_other_ranks_wait_for_one_patience_and_no_longer(
    config: TrainConfig, s3: S3Server, run_ranks: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = tmp_path / "away"
    with proxied(s3.variables["AWS_ENDPOINT_URL"], monkeypatch) as proxy:
        proxy.fault = lambda method, path, number: "fail" if away.exists() else None
        environment = s3.variables | {
            "AWS_ENDPOINT_URL": proxy.url, "DIPTYCH_STORAGE_TIMEOUT": str(_PATIENCE_SECONDS)
        }  # fmt: skip
        said, _ = run_ranks(
            _train_as_rank, 2, config, away, "the run waits up to ", environment,
            timeout_seconds=_RANKS_SECONDS,
        )  # fmt: skip
    assert proxy.done
    for start in (
        "metrics.jsonl could not be written: writing s3://",
        "the checkpoint of step 2 could not be ",
    ):
        (warning,) = (text for text in said if text.startswith(start))
        assert ": the storage is unavailable (" in warning
    assert "checkpoints can be written again: that of step " in said[-1]
    lines = read_metrics(run_uri(config))
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, _STEPS + 1))
    assert [line["warning"] for line in lines if "warning" in line] == said
    assert Checkpoints(run_uri(config), 2).load(_STEPS)["step"] == _STEPS


def test_one_that_does_not_come_back_ends_the_run_with_what_is_whole_and_how_to_resume(
    config: TrainConfig, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = tmp_path / "away"
    with proxied(s3.variables["AWS_ENDPOINT_URL"], monkeypatch) as proxy:
        monkeypatch.setenv("DIPTYCH_STORAGE_TIMEOUT", "3")
        # Reads succeed, as where a storage is overloaded by writes.
        proxy.fault = lambda method, path, number: "fail" if away.exists() and method == "PUT" else None
        with pytest.raises(UnsavedError) as ended:
            _train(config, away, "never")
        assert str(ended.value).startswith("no checkpoint could be written for 3 s: writing s3://")
        assert str(ended.value).endswith(
            f"; that of step 1 is complete; check the storage, then: diptych train --resume {run_uri(config)}"
        )
        away.unlink()
        said = _train(config, away, "the checkpoint of step ")
    assert not any("lacks steps" in text for text in said)
    steps = [line["step"] for line in read_metrics(run_uri(config)) if "loss" in line]
    assert steps == list(range(1, _STEPS + 1))
