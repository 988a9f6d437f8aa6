"""config.toml: who may write to a run's folder, and that the file is the config."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import DataConfig
from pipelines.recipes import ViewRecipe
from training.config import EncoderConfig, EvaluationConfig, OptimizerConfig, TrainConfig
from training.record import claim_run, to_toml

_CONFIGS = {
    "defaults": TrainConfig(data=DataConfig(train="somewhere")),
    "everything": TrainConfig(
        data=DataConfig(
            train='s3://bucket/train "quoted" \\ back',
            test="tests",
            recipe="simclr-cifar",
            view=ViewRecipe(crop_scale=(0.2, 0.9)),
            window_rows=24,
        ),
        name="a.b-c",
        workers=4,
        steps=7,
        temperature=0.1 + 0.2,
        encoder=EncoderConfig(name="resnet18", stem="cifar"),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-300),
        evaluation=EvaluationConfig(train_images=100),
    ),
}


def _config(**fields: Any) -> TrainConfig:
    return TrainConfig(**{"data": DataConfig(train="somewhere"), **fields})


@pytest.mark.parametrize("config", _CONFIGS.values(), ids=_CONFIGS)
def test_the_file_reads_back_into_the_same_config(config: TrainConfig) -> None:
    assert TrainConfig(**tomllib.loads(to_toml(config))) == config


def test_a_field_of_both_views_can_be_changed_in_one_place_of_the_file() -> None:
    values = tomllib.loads(to_toml(_config(data=DataConfig(train="somewhere", recipe="byol"))))
    values["data"]["view"]["size"] = 96
    first, second = TrainConfig(**values).data.views
    assert (first.size, second.size) == (96, 96)
    assert (first.blur, second.blur, second.solarise) == (1.0, 0.1, 0.2)


def test_a_run_is_claimed_by_writing_its_config(tmp_path: Path) -> None:
    claim_run(str(tmp_path / "run"), _config())
    assert TrainConfig(**tomllib.loads((tmp_path / "run/config.toml").read_text())) == _config()


def test_the_same_config_may_go_on_under_another_name_or_on_more_workers(tmp_path: Path) -> None:
    for fields in ({}, {}, {"workers": 4}, {"output": "elsewhere"}, {"name": "other"}):
        claim_run(str(tmp_path), _config(**fields))


def test_another_config_is_refused_with_the_names_of_what_differs(tmp_path: Path) -> None:
    claim_run(str(tmp_path), _config())
    before = (tmp_path / "config.toml").read_text()
    data = DataConfig(train="somewhere", view=ViewRecipe(grey=0.5, crop_scale=(0.1, 1.0)))
    other = _config(data=data, temperature=0.2, optimizer={"learning_rate": 1.0}, steps=7, workers=2)
    views = [f"data.{view}.{name}" for view in ("second_view", "view") for name in ("crop_scale", "grey")]
    expected = ", ".join([*views, "optimizer.learning_rate", "steps", "temperature;"])
    with pytest.raises(ValueError, match=f"other values of {expected}"):
        claim_run(str(tmp_path), other)
    assert (tmp_path / "config.toml").read_text() == before
