"""Settings of the objective: what has no effect is refused, by name and with the reason."""

import tomllib
from dataclasses import asdict
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.config import DataConfig
from training.config import TrainConfig
from training.run_folder import to_toml

# For each setting the configs in which it has an effect, and one in which it has none with the cause.
_SETTINGS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ({"temperature": 0.2}, {}, {"objective": "byol"}, "objective=byol"),
    ({"temperature": 0.2}, {"simclr": {"loss": "nt-logistic"}}, {"objective": "supervised"}, "supervised"),
    ({"temperature": 0.2}, {"simclr": {"loss": "nt-xent"}}, {"simclr": {"loss": "margin"}}, "loss=margin"),
    ({"temperature": 0.2}, {"simclr": {"loss": "dcl"}}, {"objective": "byol"}, "objective=byol"),
    ({"simclr": {"margin": 0.0}}, {"simclr": {"loss": "margin"}}, {}, "simclr.loss=nt-xent"),
    ({"simclr": {"margin": 0.8}}, {"simclr": {"loss": "margin-semi-hard"}}, {"objective": "byol"}, "byol"),
    ({"simclr": {"loss": "dcl"}}, {}, {"objective": "supervised"}, "objective=supervised"),
    ({"byol": {"tau_base": 0.0}}, {"objective": "byol"}, {}, "objective=simclr"),
    ({"byol": {"predictor_hidden_dim": 8}}, {"objective": "byol"}, {"objective": "supervised"}, "supervised"),
    ({"byol": {"views_apart": False}}, {"objective": "byol"}, {}, "objective=simclr"),
    ({"supervised": {"classes": 3}}, {"objective": "supervised"}, {"objective": "byol"}, "objective=byol"),
    ({"supervised": {"label_smoothing": 0.1}}, {"objective": "supervised"}, {}, "objective=simclr"),
    ({"supervised": {"labels": 0.1}}, {"objective": "supervised"}, {}, "objective=simclr"),
    ({"temperature": 0.2}, {"simclr": {"loss": "nt-logistic-semi-hard"}}, {"objective": "byol"}, "byol"),
    ({"projector": {"kind": "linear"}}, {"objective": "byol"}, {"objective": "supervised"}, "supervised"),
    ({"projector": {"layers": 3}}, {}, {"projector": {"kind": "linear"}}, "projector.kind=linear"),
    ({"projector": {"hidden_dim": 9}}, {"projector": {"kind": "non-linear"}}, {"projector": {"kind": "none"}},
     "projector.kind=none"),
    ({"projector": {"dim": 9}}, {"projector": {"kind": "linear"}}, {"projector": {"kind": "none"}},
     "projector.kind=none"),
]  # fmt: skip


def _config(*parts: dict[str, Any]) -> TrainConfig:
    fields: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            fields[key] = {**fields.get(key, {}), **value} if isinstance(value, dict) else value
    return TrainConfig(data=DataConfig(train="somewhere"), **fields)


def _dotted(setting: dict[str, Any]) -> str:
    ((key, value),) = setting.items()
    return f"{key}.{next(iter(value))}" if isinstance(value, dict) else key


@pytest.mark.parametrize(("setting", "used", "idle", "cause"), _SETTINGS)
def test_a_setting_is_taken_where_it_has_an_effect_and_refused_where_it_has_none(
    setting: dict[str, Any], used: dict[str, Any], idle: dict[str, Any], cause: str
) -> None:
    assert _config(used, setting)
    with pytest.raises(
        ValidationError, match=f"{_dotted(setting)} has no effect with .*{cause}; leave it out"
    ):
        _config(idle, setting)


def test_a_default_is_taken_where_it_has_no_effect_since_a_stored_config_has_all_of_them() -> None:
    setting = {"temperature": 0.1, "byol": {"tau_base": 0.996}, "projector": {"kind": "non-linear"}}
    assert _config({"objective": "supervised"}, setting) == _config({"objective": "supervised"})


def test_every_setting_of_an_objective_is_held_to_that() -> None:
    config = asdict(_config())
    fields = {
        f"{part}.{key}" for part in ("projector", "simclr", "byol", "supervised") for key in config[part]
    }
    assert {_dotted(setting) for setting, *_ in _SETTINGS} == fields | {"temperature"}


@pytest.mark.parametrize("objective", ["simclr", "byol", "supervised"])
def test_an_objective_needs_no_settings_and_its_record_can_be_read_again(objective: str) -> None:
    config = _config({"objective": objective})
    assert TrainConfig(**tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize(
    ("fields", "culprit"),
    [
        ({"objective": "moco"}, "objective"),
        ({"temperature": 0.001}, "temperature"),
        ({"simclr": {"loss": "nce"}}, "simclr.loss"),
        ({"objective": "byol", "byol": {"tau_base": 1.1}}, "byol.tau_base"),
        ({"objective": "supervised", "supervised": {"label_smoothing": 1.0}}, "supervised.label_smoothing"),
        ({"objective": "supervised", "supervised": {"classes": 1}}, "supervised.classes"),
        ({"projector": {"layers": 1}}, "projector.layers"),
        ({"objective": "supervised", "supervised": {"labels": 0.0}}, "supervised.labels"),
        (
            {"optimizer": {"name": "lars", "nesterov": True}},
            "nesterov has no effect with optimizer.name=lars",
        ),
    ],
)
def test_wrong_values_are_refused_by_name(fields: dict[str, Any], culprit: str) -> None:
    with pytest.raises(ValidationError, match=culprit):
        _config(fields)
