"""Warnings before a run that will hardly learn anything."""

from typing import Any

import pytest

from pipelines.config import DataConfig
from training.advice import advice
from training.config import OptimizerConfig, TrainConfig, shipped_config


def _advice(length: int, **fields: Any) -> list[str]:
    config = TrainConfig(data=DataConfig(train="photos"), **fields)
    return list(advice(config, length, steps_per_epoch=2))


def test_too_few_steps_are_said_with_the_epochs_that_are_enough() -> None:
    assert _advice(100, epochs=50) == [
        "in 100 steps hardly anything is learnt; try --epochs 500, which are 1,000 steps or more"
    ]
    (line,) = _advice(100, steps=100)
    assert "try --steps 1000," in line
    assert not _advice(1000)


@pytest.mark.parametrize(
    ("name", "batch_size", "said"), [("lars", 128, 1), ("lars", 256, 0), ("adamw", 128, 0)]
)
def test_lars_with_small_batches_is_said(name: Any, batch_size: int, said: int) -> None:
    lines = _advice(1000, batch_size=batch_size, optimizer=OptimizerConfig(name=name))
    assert ["batch_size=128" in line for line in lines] == [True] * said


def test_the_demo_has_nothing_to_be_told() -> None:
    import tomllib

    demo = tomllib.loads(shipped_config("demo").read_text())
    assert not list(advice(TrainConfig(**{**demo, "data": DataConfig(train="photos")}), demo["steps"], 7))
