"""Results that an evaluation keeps beside the run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import digit_folders

from cluster.evaluate import run_evaluation
from pipelines.config import RECIPES, DataConfig
from pipelines.index import build_index
from pipelines.reader import read_windows
from pipelines.storage.checksums import read_lines
from training.config import TrainConfig
from training.config.objective import SupervisedConfig
from training.evaluation.certainty import COMPARED
from training.evaluation.evaluator import Sets
from training.gather import LocalGather
from training.process import Worker
from training.ray_train.worker import Task
from training.run_folder import claim_run, to_toml
from training.trainer import run_uri, train


def _worker() -> Worker:
    return Worker(gather=LocalGather(), device=torch.device("cpu"), threads=1, tables=read_windows)


def _launch(
    config: TrainConfig, sets: Sets, progress: Callable[[dict[str, Any]], None], task: Task, **_: Any
) -> None:
    """In this process; progress hears what training/ray_train/launch.py's workers tell on the way."""
    progress({"phase": "workers"})
    task(config, sets, _worker(), progress)


@pytest.mark.ray
def test_only_what_was_found_is_kept(ray_cluster: None, tmp_path: Path) -> None:
    images = str(digit_folders(tmp_path / "images", 60))
    data = DataConfig(train=images, test=images, view=replace(RECIPES["simclr-cifar"][0], size=16))
    fields: dict[str, Any] = {
        "encoder": {"name": "resnet8"}, "projector": {"hidden_dim": 8, "dim": 8}, "steps": 1,
        "batch_size": 16, "evaluation": {"neighbours": 5, "diagnostic_images": 0},
    }  # fmt: skip
    config = TrainConfig(data=data, output=str(tmp_path), **fields)
    claim_run(run_uri(config), config)
    index = build_index(images, data)
    train(config, Sets.of(config, index, index), _worker(), lambda _: None)
    found = run_evaluation(run_uri(config), launch=_launch)
    judged = {"top1", "top1_margin", "neighbours", *COMPARED}
    assert found.keys() == {"step", "protocol", "labels", "features", *judged}
    lines = tmp_path / "run/evaluations.jsonl"
    assert read_lines(str(lines)) == [found]
    lines.write_bytes(lines.read_bytes().replace(b"0.", b"1.", 1))
    with pytest.raises(ValueError, match=r"evaluations.jsonl is damaged in line 1: its checksum"):
        read_lines(str(lines))


def test_a_share_of_the_labels_that_an_earlier_version_took_is_not_shared_out_again(tmp_path: Path) -> None:
    data = DataConfig(train=str(tmp_path), test=str(tmp_path))
    config = TrainConfig(data=data, objective="supervised", supervised=SupervisedConfig(labels=0.1))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(to_toml(config))
    with pytest.raises(ValueError, match=r"config.toml was written by another version of diptych"):
        run_evaluation(str(tmp_path / "run"))
