"""Search spaces, and trials' values back into configs."""

import math
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.cli.main import main
from pipelines.config import DataConfig
from training.config import EvaluationConfig, TrainConfig, config_hash
from training.config.messages import one_line
from tuning.config import SearchConfig
from tuning.space import Distribution, active, drawn_points, grid_points, parse_space, with_values

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
        ({"optimizer": {"lr": {"choice": [0.1]}}}, "'optimizer.lr' cannot be searched"),
        ({"data.test": {"choice": ["/a"]}}, "'data.test' cannot be searched"),
        ({"temperature": {"loguniforms": [0.1, 1]}}, "no distribution 'loguniforms'; loguniform?"),
        ({"temperature": {"uniform": [1.0, 0.1]}}, "low < high"),
        ({"temperature": {"loguniform": [0.0, 1.0]}}, "low above 0"),
        ({"temperature": {"choice": []}}, "at least one value"),
        ({"temperature": 0.1}, "must be a table"),
        ({}, "the search space is empty"),
        ({"temperature": {"choice": [0.1, -0.5]}}, "temperature=-0.5: Input should be greater than"),
        ({"batch_size": {"choice": [100]}}, "batch_size=100: .*; try --batch-size"),
        ({"seed": {"integers": [0.5, 2]}}, "seed: integers needs whole numbers"),
        ({"workers": {"choice": [1, 2]}}, "'workers' cannot be searched"),
        ({"temperature": {"choice": [0.1], "when": {"lanes": 8}}}, "condition on 'lanes', which is not"),
        ({"temperature": {"choice": [0.1], "when": 8}}, "temperature has when = 8"),
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


def test_a_grid_has_each_combination_of_its_choices_once() -> None:
    space = parse_space({"temperature": {"choice": [0.1, 0.5]}, "seed": {"integers": [8, 10]}}, BASE)
    assert grid_points(space) == [
        {"temperature": temperature, "seed": seed} for temperature in (0.1, 0.5) for seed in (8, 9, 10)
    ]


CONDITIONAL = {
    "optimizer.name": {"choice": ["lars", "sgd"]},
    "optimizer.nesterov": {"choice": [True, False], "when": {"optimizer.name": "sgd"}},
    "temperature": {"choice": [0.1, 0.5], "when": {"optimizer.nesterov": [True]}},
}


def test_a_key_with_a_condition_is_searched_where_that_holds_alone() -> None:
    assert grid_points(parse_space(CONDITIONAL, BASE)) == [
        {"optimizer.name": "lars"},
        {"optimizer.name": "sgd", "optimizer.nesterov": True, "temperature": 0.1},
        {"optimizer.name": "sgd", "optimizer.nesterov": True, "temperature": 0.5},
        {"optimizer.name": "sgd", "optimizer.nesterov": False},
    ]


def test_a_condition_on_a_key_that_does_not_count_does_not_hold() -> None:
    values = {"optimizer.name": "lars", "optimizer.nesterov": True, "temperature": 0.1}
    assert active(parse_space(CONDITIONAL, BASE), values) == {"optimizer.name": "lars"}


def test_draws_are_distinct_in_their_ranges_and_the_first_of_more() -> None:
    space = parse_space(
        {
            "temperature": {"loguniform": [0.01, 10.0]},
            "optimizer.momentum": {"uniform": [0.5, 0.9]},
            "seed": {"integers": [3, 5]},
        },
        BASE,
    )
    points = drawn_points(space, 7, 400)
    assert drawn_points(space, 7, 50) == points[:50]
    assert drawn_points(space, 8, 50) != points[:50]
    assert {point["seed"] for point in points} == {3, 4, 5}
    assert all(0.5 <= point["optimizer.momentum"] <= 0.9 for point in points)
    # Each decade is as likely: of 400 draws 133 in each, and 100 would be 3.5 standard deviations off.
    decades = Counter(math.floor(math.log10(point["temperature"])) for point in points)
    assert min(decades[decade] for decade in (-2, -1, 0)) > 100


def test_a_few_choices_give_as_many_trials_and_no_more() -> None:
    space = parse_space({"temperature": {"choice": [0.1, 0.5, 0.9]}}, BASE)
    assert sorted(point["temperature"] for point in drawn_points(space, 0, 10)) == [0.1, 0.5, 0.9]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("loss", "temperature and batch size move the loss's scale"),
        ("knn_top1_test", "never sees the test images"),
        ("top5", "choose one of knn, linear"),
    ],
)
def test_trials_are_ranked_by_neither_the_loss_nor_the_test_images(metric: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchConfig(train=BASE, space={"temperature": {"choice": [0.1]}}, metric=metric)


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


@pytest.mark.parametrize("scheduler", ["hyperband", "population"])
def test_a_scheduler_of_earlier_versions_is_refused_in_one_line_with_the_one_to_use(
    scheduler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = tmp_path / "old.toml"
    search.write_text(
        f'scheduler = "{scheduler}"\n[space]\ntemperature = {{ uniform = [0.1, 0.5] }}\n'
        '[train.data]\ntrain = "/images"\n'
    )
    with pytest.raises(SystemExit) as ended:
        main(["tune", str(search)])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"diptych: scheduler={scheduler}: it was removed; use asha, which also stops trials early, or none\n"
    )


def test_another_scheduler_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValidationError) as refused:
        SearchConfig(train=BASE, space={"temperature": {"choice": [0.1]}}, scheduler="median")  # pyright: ignore
    assert one_line(refused.value) == "scheduler=median: Input should be 'asha' or 'none'"
