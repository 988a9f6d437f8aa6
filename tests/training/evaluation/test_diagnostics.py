"""Alignment, uniformity and effective rank against NumPy and what is known of simple cases."""

import math

import numpy as np
import pytest
import torch

from training.evaluation.knn import alignment, effective_rank, uniformity


def _random(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def test_alignment_is_the_mean_squared_distance_of_unit_vectors():
    first, second = _random(50, 8), _random(50, 8, seed=1)
    cosine = torch.nn.functional.cosine_similarity(first.double(), second.double())
    assert alignment(first, second) == pytest.approx(float((2 - 2 * cosine).mean()), rel=1e-5)
    assert alignment(first, 3 * first) == pytest.approx(0, abs=1e-6)
    assert alignment(first, -first) == pytest.approx(4)


def test_uniformity_is_the_log_of_the_mean_potential_over_pairs():
    features = _random(2100, 5)
    unit = (features / features.norm(dim=1, keepdim=True)).double().numpy()
    squared = ((unit[:, None] - unit[None]) ** 2).sum(-1)
    pairs = squared[~np.eye(len(unit), dtype=bool)]
    assert uniformity(features) == pytest.approx(math.log(np.exp(-2 * pairs).mean()), abs=1e-4)


def test_a_collapsed_representation_has_uniformity_zero_and_rank_one():
    collapsed = torch.ones(64, 16) * torch.linspace(1, 2, 64)[:, None]
    assert uniformity(collapsed) == pytest.approx(0, abs=1e-5)
    assert effective_rank(collapsed) == pytest.approx(1, abs=1e-3)


def test_effective_rank_counts_the_directions_that_are_filled():
    directions = torch.eye(16)[:6]
    assert effective_rank(directions.repeat(10, 1)) == pytest.approx(6)
    # One direction nine times as often as the other: singular values 3 to 1.
    uneven = torch.eye(8)[[0] * 90 + [1] * 10]
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(uneven) == pytest.approx(expected, rel=1e-6)
