"""Search spaces, and trials' values back into configs."""

from dataclasses import asdict, replace
from typing import Any

import pytest

from pipelines.config import DataConfig
from training.config import EvaluationConfig, TrainConfig, config_hash
from tuning.space import Distribution, SearchConfig, parse_space, with_values

BASE = TrainConfig(data=DataConfig(train="/images"), evaluation=EvaluationConfig(every_epochs=1))


def test_dotted_and_nested_keys_are_the_same() -> None:
    dotted = parse_space({"optimizer.learning_rate": {"loguniform": [0.01, 1.0]}}, BASE)
    nested = parse_space({"optimizer": {"learning_rate": {"loguniform": [0.01, 1.0]}}}, BASE)
    assert dotted == nested == {"optimizer.learning_rate": Distribution("loguniform", (0.01, 1.0))}


def test_values_reach_their_keys_and_nothing_else() -> None:
    config = with_values(BASE, {"temperature": 0.3, "optimizer.learning_rate": 0.7, "data.view.size": 96})
    expected = asdict(BASE)
    expected["temperature"] = 0.3
    expected["optimizer"]["learning_rate"] = 0.7
    expected["data"]["view"]["size"] = expected["data"]["second_view"]["size"] = 96
    assert asdict(config) == expected


def test_trials_that_differ_in_any_searched_key_have_different_hashes() -> None:
    trials = [{"temperature": 0.1}, {"temperature": 0.2}, {"data.view.size": 96}, {"batch_size": 512}]
    assert len({config_hash(with_values(BASE, values)) for values in trials}) == len(trials)


def test_value_that_makes_no_valid_config_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature"):
        with_values(BASE, {"temperature": -1.0})


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"temprature": {"choice": [0.1]}}, "did you mean temperature?"),
        ({"optimizer": {"lr": {"choice": [0.1]}}}, "'optimizer.lr' is no key"),
        ({"data.test": {"choice": ["/a"]}}, "'data.test' is no key that can be searched"),
        ({"temperature": {"loguniforms": [0.1, 1]}}, "no distribution 'loguniforms'; loguniform?"),
        ({"temperature": {"uniform": [1.0, 0.1]}}, "low < high"),
        ({"temperature": {"loguniform": [0.0, 1.0]}}, "low above 0"),
        ({"temperature": {"choice": []}}, "at least one value"),
        ({"temperature": 0.1}, "must be a table"),
        ({}, "the search space is empty"),
    ],
)
def test_wrong_space_says_what_and_the_way_out(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        SearchConfig(train=BASE, space=space)


def test_search_on_the_test_images_is_refused() -> None:
    with pytest.raises(ValueError, match="never sees the test images"):
        SearchConfig(
            train=replace(BASE, data=DataConfig(train="/images", test="/more")),
            space={"temperature": {"choice": [0.1]}},
        )


def test_early_stopping_without_evaluations_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set train\.evaluation\.every_epochs"):
        SearchConfig(
            train=TrainConfig(data=DataConfig(train="/images")), space={"temperature": {"choice": [0.1]}}
        )


def test_a_grid_has_each_combination_of_its_choices() -> None:
    space = {"temperature": {"choice": [0.1, 0.5]}, "batch_size": {"integers": [8, 10]}}
    assert SearchConfig(train=BASE, space=space, searcher="grid", trials=1).count == 6
    assert SearchConfig(train=BASE, space=space, searcher="tpe", trials=5).count == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"space": {"temperature": {"uniform": [0.1, 0.5]}}},
            "searcher=grid tries all values, and temperature",
        ),
        ({"compound": True}, "compound=true has no grid of values"),
    ],
)
def test_what_has_no_grid_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchConfig(train=BASE, searcher="grid", **fields)
