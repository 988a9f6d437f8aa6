"""Fine-tuning a run: its config is valid whatever the run was, and keeps the network."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from small_digits import write_small_digits

from pipelines.index import build_index
from pipelines.reader import read_windows
from training.config import FinetuneConfig, TrainConfig
from training.evaluation.evaluator import Sets
from training.evaluation.finetune import finetune_config
from training.gather import LocalGather
from training.metrics import read_metrics
from training.process import Worker
from training.trainer import run_uri, train

# Each objective with its own settings, and all else that can be set of a run: none may be in the way.
_RUNS: dict[str, list[dict[str, Any]]] = {
    "simclr": [
        {"temperature": 0.5}, {"exact": True},
        *({"projector": part} for part in ({"kind": "none"}, {"kind": "linear", "dim": 8})),
        *({"projector": part} for part in ({"layers": 3}, {"hidden_dim": 8}, {"dim": 8})),
        {"simclr": {"loss": "nt-logistic"}},
        {"simclr": {"loss": "margin", "margin": 0.2}},
    ],
    "byol": [
        {"byol": {"tau_base": 0.5, "predictor_hidden_dim": 8}},
        {"projector": {"layers": 3, "hidden_dim": 8, "dim": 8}},
        {"data": {"recipe": "byol"}},
    ],
    "supervised": [
        {"supervised": {"classes": 10, "label_smoothing": 0.1, "labels": 0.5}},
        {"data": {"recipe": "supervised"}},
    ],
    "mine_tuned:Mine": [{"objective_options": {"scale": 0.5}}],
    "any": [
        {"init": "/other.pt"}, {"steps": 7}, {"epochs": 3}, {"seed": 3},
        {"lanes": 4}, {"batch_size": 64}, {"batch_size": 64, "micro_batch_size": 32}, {"compile": True},
        {"precision": "bfloat16"}, {"workers": "1:2"}, {"cpus_per_worker": 1.0}, {"gpus_per_worker": 0.5},
        {"wait_for_nodes": 60.0}, {"retries": 0}, {"timeout": 60.0}, {"trackers": ("mlflow",)},
        {"encoder": {"name": "efficientnet-b0", "drop_path": 0.1}},
        {"encoder": {"name": "efficientnet", "alpha": 1.2, "gamma": 1.0, "phi": 2.0, "base_size": 224}},
        {"encoder": {"name": "resnet18", "stem": "cifar", "width": 2}},
        {"optimizer": {"name": "adamw", "clip_norm": 1.0, "average_decay": 0.9, "scaling": "none"}},
        {"evaluation": {"every_epochs": 2, "held_out": 0.2, "linear": True, "neighbours": 5}},
        {"evaluation": {"train_images": 9, "test_images": 9, "temperature": 0.2, "batch_size": 9}},
        {"checkpoint": {"every_steps": 3, "every_minutes": 1.0, "keep": 1}},
        {"data": {"view": {"size": 16, "blur": 0.0, "crop_scale": (0.3, 0.8), "flip": 0.0}}},
        {"data": {"view": {"centre_crop": 0.9}}}, {"data": {"second_view": {"solarise": 0.5}}},
        {"data": {"recipe": "simclr-cifar", "view": {"cutout": 0.5, "rotate": 0.5, "sobel": 0.1}}},
        {"data": {"recipe": "evaluation", "max_bad_share": 0.5, "window_rows": 12, "label_column": "y"}},
        {"name": "other", "output": "/elsewhere"},
    ],
}  # fmt: skip


def _cases() -> list[tuple[str, dict[str, Any]]]:
    return [
        (objective, case)
        for objective in ("simclr", "byol", "supervised", "mine_tuned:Mine")
        for case in [*_RUNS[objective], *_RUNS["any"]]
        # Training with labels has one view.
        if objective != "supervised" or "second_view" not in case.get("data", {})
    ]


def _run(objective: str, case: dict[str, Any]) -> TrainConfig:
    data = {"train": "/images", "test": "/tests", **case.get("data", {})}
    return TrainConfig(**{**case, "data": data, "objective": objective})


def test_every_setting_of_a_run_is_among_the_cases() -> None:
    named = {key for _, case in _cases() for key in case}
    assert named >= {field.name for field in fields(TrainConfig)} - {"objective"}


def test_any_run_can_be_fine_tuned() -> None:
    for objective, case in _cases():
        run = _run(objective, case)
        tuned = finetune_config(run, "/c.pt", FinetuneConfig(), share=0.1, images=4000, classes=10)
        assert (tuned.objective, tuned.init) == ("supervised", "/c.pt")
        assert (tuned.supervised.classes, tuned.supervised.labels) == (10, 0.1)
        for name in ("encoder", "seed", "lanes", "workers", "trackers", "checkpoint", "precision"):
            assert getattr(tuned, name) == getattr(run, name)
        for name in ("size", "flip", "crop_scale", "mean"):
            assert getattr(tuned.data.view, name) == getattr(run.data.view, name)
        assert (tuned.data.test, tuned.data.label_column) == (run.data.test, run.data.label_column)


def test_settings_tell_fine_tunings_apart_by_name() -> None:
    run = _run("simclr", {})
    named = {
        finetune_config(run, checkpoint, settings, share=share, images=4000, classes=10).name
        for checkpoint in ("/a.pt", "/b.pt")
        for settings in (FinetuneConfig(), FinetuneConfig(epochs=3))
        for share in (0.5, 1.0)
    }
    assert len(named) == 8


def test_a_few_images_are_a_batch_of_more_than_one() -> None:
    for lanes, images, expected in ((1, 10, 2), (1, 30, 3), (4, 10, 4), (4, 90, 8), (4, 9000, 256)):
        tuned = finetune_config(
            _run("simclr", {"lanes": lanes}), "/c.pt", FinetuneConfig(), share=0.5, images=images, classes=3
        )
        assert tuned.batch_size == expected


_CODE = """
from training import Objective

class Mine(Objective):
    def __init__(self, encoder, *, gather, scale: float = 1.0):
        super().__init__(encoder)
        self.scale = scale

    def embed(self, views):
        return [self.encoder(image) for image in views.images]

    def loss(self, embedded, views):
        return self.scale * (embedded[0] - embedded[1]).square().mean()
"""


def test_a_run_of_ones_own_objective_is_fine_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_tuned.py").write_text(_CODE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    write_small_digits(tmp_path, 49)
    data = {"train": str(tmp_path / "train"), "test": str(tmp_path / "test"), "window_rows": 12}
    values: dict[str, Any] = {
        "data": data | {"view": {"size": 16, "blur": 0.0}}, "objective_options": {"scale": 0.5},
        "output": str(tmp_path), "steps": 1, "batch_size": 24, "lanes": 2, "encoder": {"name": "resnet8"},
        "evaluation": {"diagnostic_images": 0, "neighbours": 5},
    }  # fmt: skip
    run = _run("mine_tuned:Mine", values)
    _train(run)
    checkpoint = f"{run_uri(run)}/checkpoints/step-000000001.pt"
    settings = FinetuneConfig(epochs=2)
    tuned = finetune_config(run, checkpoint, settings, share=1.0, images=49, classes=10)
    _train(tuned)
    lines = read_metrics(run_uri(tuned))
    assert [line["top1"] for line in lines if "top1" in line][-1] >= 0
    assert max(line["step"] for line in lines) == tuned.epochs * (49 // tuned.batch_size)


def _train(config: TrainConfig) -> None:
    worker = Worker(gather=LocalGather(), device=torch.device("cpu"), threads=1, tables=read_windows)
    assert config.data.test
    indexes = [build_index(uri, config.data) for uri in (config.data.train, config.data.test)]
    train(config, Sets.of(config, *indexes), worker, lambda _: None)
