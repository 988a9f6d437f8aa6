"""What makes two runs the same run, and which settings are refused."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.config import DataConfig, ViewRecipe
from training.config import TrainConfig, config_hash, identity, shipped_config, training_recipes


def _config(**fields: Any) -> TrainConfig:
    return TrainConfig(data=DataConfig(train="somewhere"), **fields)


@pytest.mark.parametrize("fields", [{"name": "other"}, {"output": "s3://bucket/runs"}, {"workers": 4}])
def test_where_and_on_how_many_workers_a_run_runs_is_not_its_identity(fields: dict[str, Any]) -> None:
    assert identity(_config(**fields)) == identity(_config())
    assert config_hash(_config(**fields)) == config_hash(_config())


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.2},
        {"seed": 1},
        {"lanes": 4},
        {"steps": 7},
        {"encoder": {"name": "resnet18"}},
        {"optimizer": {"learning_rate": 0.31}},
    ],
)
def test_all_else_is(fields: dict[str, Any]) -> None:
    assert config_hash(_config(**fields)) != config_hash(_config())


def test_the_data_and_the_views_are_part_of_the_identity() -> None:
    grey = TrainConfig(data=DataConfig(train="somewhere", view=ViewRecipe(grey=0.3)))
    elsewhere = TrainConfig(data=DataConfig(train="elsewhere"))
    assert len({config_hash(config) for config in (_config(), grey, elsewhere)}) == 3


def test_a_whole_number_is_the_same_setting_as_its_float() -> None:
    assert config_hash(_config(temperature=1)) == config_hash(_config(temperature=1.0))


@pytest.mark.parametrize(
    ("fields", "culprit"),
    [
        ({"temprature": 0.1}, "temprature"),
        ({"temperature": 0.0}, "temperature"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"name": "../elsewhere"}, "name"),
        ({"encoder": {"name": "resnet19"}}, "encoder.name"),
        ({"optimizer": {"momentum": 1.5}}, "optimizer.momentum"),
        ({"micro_batch_size": 100}, "must be a multiple of lanes=8 and divide batch_size=256; try .* 128"),
        ({"micro_batch_size": 48}, "must be a multiple of lanes=8 and divide batch_size=256; try .* 32"),
        ({"encoder": {"name": "resnet20", "stem": "cifar"}}, "encoder.stem has no effect on resnet20"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(fields: dict[str, Any], culprit: str) -> None:
    with pytest.raises(ValidationError, match=culprit):
        _config(**fields)


@pytest.mark.parametrize(
    "path", sorted(shipped_config("demo").parent.glob("*.toml")), ids=lambda path: path.stem
)
def test_a_shipped_config_is_valid_and_opens_with_its_command_hardware_and_expectation(path: Path) -> None:
    text = path.read_text()
    values = tomllib.loads(text)
    TrainConfig(**values | {"data": values.get("data", {}) | {"train": "somewhere"}})
    opening = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    command = "diptych demo" if path.stem == "demo" else f"diptych train {path.stem} "
    assert command in opening
    assert re.search(r"cores|GPU", opening)
    assert re.search(r"\d %|unknown", opening)


_ONE = {"batch_size": 1, "lanes": 1}
_ONE_AT_A_TIME = {"batch_size": 6, "lanes": 1, "micro_batch_size": 1}
_VIT = {"encoder": {"name": "torchvision:vit_b_16"}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(
            (_ONE | {"simclr": {"loss": loss}}, "batch_size=1 leaves SimCLR no other image .*; try .* 2$")
            for loss in (
                "nt-xent",
                "dcl",
                "nt-logistic",
                "nt-logistic-semi-hard",
                "margin",
                "margin-semi-hard",
            )
        ),
        ({"batch_size": 1, "lanes": 4}, "try --batch-size 4$"),
        (_ONE | _VIT | {"projector": {"kind": "none"}}, "leaves SimCLR no other image"),
        (_ONE | {"objective": "byol"}, "batch_size=1 gives batch norm a single image; try --batch-size 2$"),
        (_ONE | _VIT | {"objective": "byol"}, "gives batch norm a single image"),
        (_ONE | {"objective": "supervised"}, "gives batch norm a single image"),
        (_ONE | {"objective": "mine:Mine"}, "gives batch norm a single image"),
        (_ONE_AT_A_TIME, "micro_batch_size=1 gives batch norm a single image; try --micro-batch-size 2$"),
        (_ONE_AT_A_TIME | {"batch_size": 35, "objective": "byol"}, "try --micro-batch-size 5$"),
        (_ONE_AT_A_TIME | _VIT, "micro_batch_size=1 gives batch norm a single image"),
    ],
)
def test_one_image_at_a_time_is_refused_where_others_are_needed(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        _config(**fields)
    assert re.search(message, refused.value.errors()[0]["msg"])


def test_a_second_view_of_its_own_is_refused_where_one_view_is_trained_on() -> None:
    for data in ({"second_view": {"solarise": 0.5}}, {"recipe": "byol", "second_view": {"blur": 0.3}}):
        with pytest.raises(ValueError, match=r"data.second_view.\w+ has no effect with objective=supervised"):
            TrainConfig(data={"train": "x", **data}, objective="supervised")  # pyright: ignore
    for data in ({"recipe": "byol"}, {"view": {"solarise": 0.5}}, {"recipe": "byol", "view": {"grey": 0.0}}):
        config = TrainConfig(data={"train": "x", **data}, objective="supervised")  # pyright: ignore
        assert training_recipes(config) == (config.data.view,)
        assert len(training_recipes(replace(config, objective="simclr"))) == 2


def test_one_image_at_a_time_is_taken_where_nothing_needs_others() -> None:
    assert _config(**_ONE | _VIT | {"objective": "supervised"}).batch_size == 1
    assert _config(**_ONE | _VIT | {"objective": "mine:Mine"}).batch_size == 1
    alone = _config(**_ONE_AT_A_TIME | _VIT | {"projector": {"kind": "none"}})
    assert alone.micro_batch_size == 1
    assert _config(batch_size=2, lanes=2, workers=2).batch_size == 2
