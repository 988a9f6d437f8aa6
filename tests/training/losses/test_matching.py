"""View matching against the argmax over the full matrix, in one process and over real ranks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from training.gather import LocalGather, ProcessGroupGather
from training.losses import (
    Matching,
    dcl,
    margin_triplet,
    nt_logistic,
    nt_xent,
    predictions_matched,
    semi_hard_nt_logistic,
    semi_hard_triplet,
)
from training.losses.matching import chance

_LOSSES: dict[str, tuple[Callable[..., Tensor], dict[str, float]]] = {
    "nt-xent": (nt_xent, {"temperature": 0.1}),
    "nt-xent, cold": (nt_xent, {"temperature": 0.01}),
    "nt-xent, hot": (nt_xent, {"temperature": 100.0}),
    "dcl": (dcl, {"temperature": 0.1}),
    "nt-logistic": (nt_logistic, {"temperature": 0.2}),
    "margin": (margin_triplet, {"margin": 0.4}),
    "semi-hard": (semi_hard_triplet, {"margin": 0.3}),
    "semi-hard nt-logistic": (semi_hard_nt_logistic, {"temperature": 0.2}),
}


def _argmax_share(first: Tensor, second: Tensor, of: tuple[Tensor, Tensor] | None = None) -> float:
    """Rows whose nearest row, of all but itself, is that of the other view; `of`: nearest rows of these."""
    rows, columns = (
        np.concatenate([view.double().numpy() for view in views])
        for views in ((first, second), of or (first, second))
    )
    rows, columns = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (rows, columns))
    similarities = rows @ columns.T
    np.fill_diagonal(similarities, -np.inf)
    partners = np.roll(np.arange(len(rows)), len(first))
    return float(np.mean(similarities.argmax(1) == partners))


def _views(n: int, dtype: torch.dtype = torch.float64, dim: int = 8) -> tuple[Tensor, Tensor]:
    """Two views of n images, some alike and some not, of very different lengths."""
    generator = torch.Generator().manual_seed(n)
    first, noise = torch.randn(2, n, dim, generator=generator, dtype=torch.float64)
    second = first + noise * torch.linspace(0.05, 2, n)[:, None]
    lengths = torch.rand(2, n, 1, generator=generator, dtype=torch.float64) * 5 + 0.1
    return (first * lengths[0]).to(dtype), (second * lengths[1]).to(dtype)


def _gather() -> Any:
    return ProcessGroupGather() if dist.is_initialized() else LocalGather()


def _mine(*views: Tensor) -> list[Tensor]:
    gather = _gather()
    return [view.chunk(gather.world_size)[gather.rank].clone().requires_grad_() for view in views]


def _matched(name: str, first: Tensor, second: Tensor) -> tuple[float | None, Tensor, Tensor]:
    """What one rank finds with its own share of the rows, and its loss and gradient."""
    loss, settings = _LOSSES[name]
    mine, matching = _mine(first, second), Matching()
    value = loss(*mine, **settings, gather=_gather(), matching=matching)
    gradient = torch.autograd.grad(value, mine[0])[0]
    return matching.take(), value.detach(), gradient


def _predicted(predictions: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> float:
    prediction, target = (torch.cat(_mine(*views)) for views in (predictions, targets))
    return float(predictions_matched(prediction, target, gather=_gather()))


# With 1,100 images every one of four ranks has 550 rows, which is more than a block's 512.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("name", "n"), [*((name, 28) for name in _LOSSES), ("nt-xent", 1100), ("margin", 1100)]
)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_share_is_that_of_the_full_matrix_on_any_number_of_ranks(
    world_size: int, name: str, n: int, dtype: torch.dtype, run_ranks: Callable
) -> None:
    views = _views(n, dtype)
    expected = _argmax_share(*views)
    assert 0.2 < expected < 0.9
    for share, *_ in run_ranks(_matched, world_size, name, *views):
        assert share == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("n", [28, 1100])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_predictions_are_held_against_the_targets_of_all_other_views(
    world_size: int, n: int, run_ranks: Callable
) -> None:
    targets = _views(n)
    noise = torch.randn(2, n, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    predictions = (targets[0] + 0.2 * noise[0], targets[1] + 0.2 * noise[1])
    expected = _argmax_share(*predictions, of=targets)
    assert 0.1 < expected < 0.9
    assert (
        run_ranks(_predicted, world_size, predictions, targets)
        == [pytest.approx(expected, abs=1e-7)] * world_size
    )


@pytest.mark.parametrize("name", _LOSSES)
def test_asking_for_it_changes_neither_loss_nor_gradient(name: str) -> None:
    views = _views(300, torch.float32)
    _, value, gradient = _matched(name, *views)
    loss, settings = _LOSSES[name]
    mine = _mine(*views)
    plain = loss(*mine, **settings)
    assert torch.equal(plain, value)
    assert torch.equal(torch.autograd.grad(plain, mine[0])[0], gradient)


@pytest.mark.parametrize("name", [name for name in _LOSSES if name != "nt-xent, hot"])
def test_autocast_does_not_lower_its_precision(name: str) -> None:
    # All within a few degrees of one direction: bfloat16 cannot tell most of their similarities apart.
    first, second = (view / 50 + 1 for view in _views(300, torch.float32, 64))
    expected = _argmax_share(first, second)
    rows = F.normalize(torch.cat([first, second]), dim=1).bfloat16()
    coarse = (rows @ rows.T).fill_diagonal_(-torch.inf).argmax(1)
    assert float((coarse == torch.arange(600).roll(300)).float().mean()) < expected / 2
    with torch.autocast("cpu", torch.bfloat16):
        assert _matched(name, first, second)[0] == pytest.approx(expected, abs=1e-7)
        assert _predicted((first, second), (first, second)) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("name", _LOSSES)
def test_views_that_say_nothing_of_their_image_match_by_chance(name: str) -> None:
    generator, n, found = torch.Generator().manual_seed(0), 20, []
    for _ in range(200):
        first, second = torch.randn(2, n, 8, generator=generator)
        found.append(_matched(name, first, second)[0])
    # Each is the mean of 2n rows, of which a row and its partner match nearly together.
    deviation = (chance(n) / (n * len(found))) ** 0.5
    assert np.mean(np.array(found, float)) == pytest.approx(chance(n), abs=4 * deviation)


@pytest.mark.parametrize("noise", [0.0, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", _LOSSES)
def test_views_that_collapsed_to_a_point_match_no_more_than_by_chance(
    name: str, dtype: torch.dtype, noise: float
) -> None:
    n = 600
    generator = torch.Generator().manual_seed(0)
    point = torch.rand(1, 128, generator=generator, dtype=torch.float64)
    views = point + noise * torch.randn(2 * n, 128, generator=generator, dtype=torch.float64)
    first, second = views.to(dtype).split(n)
    deviation = (chance(n) / n) ** 0.5
    assert _matched(name, first, second)[0] == pytest.approx(0, abs=chance(n) + 4 * deviation)
    assert _predicted((first, second), (first, second)) == pytest.approx(0, abs=chance(n) + 4 * deviation)


def test_what_was_taken_is_not_there_again() -> None:
    matching = Matching(torch.tensor(0.25))
    assert matching.take() == 0.25
    assert matching.take() is None
