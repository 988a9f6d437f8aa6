"""config.toml: who may write to a run's folder, and that the file is the config."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import DataConfig, ViewRecipe
from training.config import (
    EncoderConfig,
    EvaluationConfig,
    OptimizerConfig,
    ProjectorConfig,
    TrainConfig,
    config_hash,
)
from training.run_folder import FORMAT, claim_run, find_run, read_config, read_values, to_toml, to_values

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


def test_a_file_that_is_cut_anywhere_or_empty_is_damaged(tmp_path: Path) -> None:
    claim_run(str(tmp_path), _config())
    path = tmp_path / "config.toml"
    content = path.read_bytes()
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=rf"^{path} is damaged: .*; restore it"):
            read_config(str(tmp_path))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"^{path} is damaged: it is empty; restore it$"):
        read_config(str(tmp_path))


def test_an_edited_file_is_taken_without_the_line_of_its_checksum(tmp_path: Path) -> None:
    claim_run(str(tmp_path), _config())
    path = tmp_path / "config.toml"
    edited = path.read_text().replace("epochs = 100", "epochs = 200")
    path.write_text(edited)
    with pytest.raises(ValueError, match=r"if you have edited it, delete the line with its crc32$"):
        find_run(str(tmp_path), _config(epochs=200))
    path.write_text(edited.partition("\n")[2])
    assert find_run(str(tmp_path), _config(epochs=200))


_OTHERS = {
    "before there were formats": "",
    "older": f"# format: {FORMAT - 1}\n",
    "newer, with a field that is unknown": f"# format: {FORMAT + 1}\nunknown = 1\n",
}


@pytest.mark.parametrize("head", _OTHERS.values(), ids=_OTHERS)
def test_a_run_of_another_format_is_not_resumed(head: str, tmp_path: Path) -> None:
    """Though what it says is the same: a field that it lacks had no value, or another than today's."""
    path, content = tmp_path / "config.toml", head + to_toml(_config())
    path.write_text(content)
    for resume in (find_run, claim_run):
        with pytest.raises(
            ValueError, match=r"config.toml was written by another version of diptych .*; resume"
        ):
            resume(str(tmp_path), _config())
    with pytest.raises(ValueError, match=r"config.toml was written by another version of diptych .*; resume"):
        read_values(str(tmp_path), resumed=True)
    assert path.read_text() == content


def test_a_run_of_another_format_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(to_toml(_config()))
    assert read_config(str(tmp_path)).batch_size == _config().batch_size


def test_fields_and_their_defaults_are_those_of_the_format() -> None:
    """Where this fails, runs that were begun before would resume as something else: raise FORMAT too."""
    assert EncoderConfig(name="efficientnet-b0").drop_path == 0.2
    assert [ProjectorConfig().widths(name, 512) for name in ("simclr", "byol")] == [(512, 128), (4096, 256)]
    assert (FORMAT, config_hash(_config())) == (1, "85c068f10539deaf")


def test_a_config_of_this_format_that_leaves_defaults_out_is_the_same_run() -> None:
    stored = to_values(_config())
    for name in ("temperature", "projector", "simclr", "byol", "supervised"):
        del stored[name]
    assert config_hash(TrainConfig(**stored)) == config_hash(_config())
