"""Compound scaling against Tan and Le's equation, and what the scaled networks really cost."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.config import DataConfig
from training.config import TrainConfig
from training.config.encoder import EncoderConfig, Scaling
from training.models.efficientnet import EfficientNet, count_multiply_adds, last_map_side
from training.models.encoders import encoder_cost
from tuning.compound import (
    COEFFICIENTS,
    Coefficients,
    Dimension,
    coefficients_of,
    doubles_the_cost,
    next_good_size,
    on_surface,
    scaled,
    score,
)
from tuning.config import SearchConfig
from tuning.searcher import SCORE, PointSearcher, TrialSlots
from tuning.space import Point
from tuning.trial_config import check_surface, trial_config, trial_points


def _config(size: int = 224, **encoder: Any) -> TrainConfig:
    data: Any = {"train": "/data", "view": {"size": size}}
    return TrainConfig(data=DataConfig(**data), encoder=EncoderConfig(**{"name": "efficientnet", **encoder}))


def test_the_paper_s_coefficients_are_those_of_its_section_3_3() -> None:
    assert COEFFICIENTS["compound"] == (1.2, 1.1, 1.15)
    assert COEFFICIENTS["compound"].growth == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("dimension", ["depth", "width", "resolution"])
def test_one_dimension_alone_doubles_the_cost_too(dimension: Dimension) -> None:
    assert COEFFICIENTS[dimension].growth == pytest.approx(2)
    assert sum(value != 1 for value in COEFFICIENTS[dimension]) == 1


@pytest.mark.parametrize("phi", [0.0, 0.5, 1.0, 2.0])
def test_scaled_is_the_network_that_the_encoder_s_own_coefficients_give(phi: float) -> None:
    coefficients = {"alpha": 1.3, "beta": 1.05, "gamma": 1.2}
    size = round(200 * 1.2**phi)
    own = _config(size, **coefficients, phi=phi, base_size=200)
    found = scaled(_config(200), Coefficients(**coefficients), phi)
    assert found.data.view.size == found.data.second_view.size == size
    assert encoder_cost(found.encoder, size) == encoder_cost(own.encoder, size)


def test_a_config_with_coefficients_is_scaled_from_its_own_phi_0() -> None:
    config = _config(240, alpha=1.3, gamma=1.2, phi=1.0, base_size=200, width=0.5)
    assert coefficients_of(config) == (1.3, 1.0, 1.2)
    zero, one = (scaled(config, coefficients_of(config), phi) for phi in (0.0, 1.0))
    assert (zero.encoder.depth, zero.encoder.width, zero.data.view.size) == (1.0, 0.5, 200)
    assert (one.encoder.depth, one.encoder.width, one.data.view.size) == (1.3, 0.5, 240)
    assert encoder_cost(one.encoder, 240) == encoder_cost(config.encoder, 240)


def test_a_config_with_one_coefficient_alone_starts_from_its_views() -> None:
    one = _config(64, alpha=1.5)
    assert scaled(one, coefficients_of(one), 0.0).encoder.alpha == 1.5
    found = scaled(one, coefficients_of(one), 1.0)
    assert found.data.view.size == 64
    assert encoder_cost(found.encoder, 64) == encoder_cost(one.encoder, 64)


def test_a_scaled_config_can_be_scaled_again_from_the_same_phi_0() -> None:
    coefficients = Coefficients(1.3, 1.05, 1.2)
    once = scaled(_config(200), coefficients, 1.0)
    assert coefficients_of(once) == coefficients
    assert scaled(once, coefficients_of(once), 2.0) == scaled(_config(200), coefficients, 2.0)


def test_points_lie_on_the_surface_and_share_the_growth_out_evenly() -> None:
    points = [on_surface(*pair) for pair in np.random.default_rng(0).random((4000, 2))]
    shares = np.array([[np.log2(a), 2 * np.log2(b), 2 * np.log2(c)] for a, b, c in points])
    assert shares.sum(1) == pytest.approx(1)
    assert shares.min() >= 0
    # Uniform on a triangle each share has the mean 1/3 and the variance 1/18.
    assert shares.mean(0) == pytest.approx(1 / 3, abs=0.02)
    assert shares.var(0) == pytest.approx(1 / 18, abs=0.005)


def test_twice_the_cost_is_worth_five_percent_of_the_accuracy() -> None:
    assert score(0.8, 1e9, 1e9) == 0.8
    assert score(0.8, 2e9, 1e9) == pytest.approx(0.8 * 2**-0.07)


@pytest.mark.parametrize("dimension", list(COEFFICIENTS))
def test_measured_multiply_adds_grow_as_the_equation_says(dimension: Dimension) -> None:
    costs = []
    for phi in (0.0, 2.0, 4.0):
        config = scaled(_config(), COEFFICIENTS[dimension], phi)
        costs.append(encoder_cost(config.encoder, config.data.view.size).multiply_adds)
    # Channels come in eights and layers in ones, so it is near, and never the same.
    growth = math.sqrt(costs[2] / costs[1])
    assert growth == pytest.approx(COEFFICIENTS[dimension].growth, rel=0.06)
    assert costs[1] / costs[0] == pytest.approx(COEFFICIENTS[dimension].growth ** 2, rel=0.3)


@pytest.mark.parametrize("seed", range(8))
def test_multiply_adds_are_counted_as_the_network_s_own_operations(seed: int) -> None:
    generator = random.Random(seed)
    width, depth = (math.exp(generator.uniform(-1, 1)) for _ in range(2))
    size = generator.randint(8, 160)
    config = EncoderConfig(name="efficientnet", width=width, depth=depth)
    assert count_multiply_adds(width, depth, size) == encoder_cost(config, size).multiply_adds


@pytest.mark.parametrize("size", [8, 31, 32, 33, 64, 65, 100])
def test_the_last_map_s_side_is_the_network_s(size: int) -> None:
    seen = []
    with torch.device("meta"):
        trunk = EfficientNet(width=0.25, depth=0.5, drop_path=0.0).eval()
        trunk.avgpool.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0].shape[2:]))
        trunk(torch.empty(1, 3, size, size))
    assert seen == [last_map_side(size)] * 2


def _search(size: int, **fields: Any) -> SearchConfig:
    train: dict[str, Any] = {
        "data": {"train": "/data", "view": {"size": size}},
        "encoder": {"name": "efficientnet-b0"},
        "evaluation": {"every_epochs": 1},
    }
    return SearchConfig(compound=True, train=train | fields.pop("train", {}), **fields)  # pyright: ignore[reportArgumentType]


def _cost(config: TrainConfig) -> int:
    return encoder_cost(config.encoder, config.data.view.size).multiply_adds


def _suggested(search: SearchConfig) -> list[Point]:
    """The points that TPE tries if a higher resolution scores better."""
    searcher, points = PointSearcher(search, [], TrialSlots(1)), []
    while point := searcher.suggest(f"t_{len(points)}"):
        points.append(point)
        searcher.on_trial_complete(f"t_{len(points) - 1}", {SCORE: -point["compound.v"]})
    return points


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("searcher", ["random", "tpe"])
@pytest.mark.parametrize("size", [40, 112])
def test_all_that_is_tried_lies_on_the_surface_and_costs_twice_as_measured(
    size: int, searcher: Any, seed: int
) -> None:
    search = _search(size, searcher=searcher, seed=seed, trials=4)
    check_surface(search)
    points = trial_points(search) if searcher == "random" else _suggested(search)
    assert len({repr(point) for point in points}) == 4
    target = 2 * _cost(scaled(search.train, COEFFICIENTS["compound"], 0.0))
    for point in points:
        config = trial_config(search, point)
        encoder = config.encoder
        assert encoder.alpha * encoder.beta**2 * encoder.gamma**2 == pytest.approx(2)  # pyright: ignore
        assert 0.9 <= _cost(config) / target <= 1.1
    again = _search(size, searcher=searcher, seed=seed, trials=4)
    assert (trial_points(again) if searcher == "random" else _suggested(again)) == points


def test_other_keys_that_change_the_cost_are_measured_along() -> None:
    space = {"data.view.size": {"choice": [72, 96, 100]}, "encoder.drop_path": {"uniform": [0.0, 0.3]}}
    points = trial_points(_search(100, space=space, trials=6))
    assert {point["data.view.size"] for point in points} <= {72, 100}  # At 96 one in 300 is kept.
    for point in points:
        config = trial_config(_search(100, space=space), point)
        base = scaled(config, coefficients_of(config), 0.0)
        assert base.data.view.size == point["data.view.size"]
        assert 1.8 <= _cost(config) / _cost(base) <= 2.2


def test_no_size_that_makes_last_maps_of_2_x_2_is_offered() -> None:
    generator = np.random.default_rng(0)
    for size in (16, 24, 30, 32):
        base = Scaling(1.0, 1.0, size)
        kept = [
            pair
            for pair in (on_surface(*two) for two in generator.random((3000, 2)))
            if doubles_the_cost(base, pair)
        ]
        assert kept
        assert all(round(size * gamma) <= 32 for _, _, gamma in kept)


@pytest.mark.parametrize(("size", "way_out"), [(32, 36), (96, 100), (224, 228)])
def test_a_view_size_with_too_few_networks_of_twice_the_cost_is_refused_with_one_that_has_enough(
    size: int, way_out: int
) -> None:
    with pytest.raises(
        ValueError, match=rf"view.size={size}, \d+ of 1000 .* try train.data.view.size={way_out}$"
    ):
        check_surface(_search(size))
    assert next_good_size(size) == way_out
    check_surface(_search(way_out))


def test_b0_without_a_classifier_costs_what_the_paper_says() -> None:
    cost = encoder_cost(EncoderConfig(name="efficientnet-b0"), 224)
    # Table 2: 5.3 million parameters, 1,281,000 of them the classifier's, and 0.39 billion multiply-adds.
    assert cost.parameters + 1_281_000 == pytest.approx(5.3e6, rel=0.01)
    assert cost.multiply_adds == pytest.approx(0.39e9, rel=0.02)


@pytest.mark.parametrize(
    ("name", "way_out"),
    [("resnet18", "only EfficientNets"), ("efficientnet-b3", "set encoder.name=efficientnet-b0")],
)
def test_what_cannot_be_scaled_is_named(name: str, way_out: str) -> None:
    with pytest.raises(ValueError, match=f"encoder.name={name} cannot be scaled: {way_out}"):
        scaled(_config(name=name), COEFFICIENTS["compound"], 1.0)
