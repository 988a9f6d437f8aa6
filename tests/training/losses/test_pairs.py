"""NT-Logistic, margin triplets and BYOL's loss against their formulas, row by row, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from training.gather import LocalGather, ProcessGroupGather
from training.losses import (
    byol_loss,
    margin_triplet,
    nt_logistic,
    semi_hard_nt_logistic,
    semi_hard_triplet,
)

_LOSSES: dict[str, tuple[Callable[..., Tensor], dict[str, float]]] = {
    "nt-logistic": (nt_logistic, {"temperature": 0.2}),
    "margin": (margin_triplet, {"margin": 0.4}),
    "semi-hard": (semi_hard_triplet, {"margin": 0.3}),
    "semi-hard nt-logistic": (semi_hard_nt_logistic, {"temperature": 0.2}),
    "byol": (byol_loss, {}),
}
_OF_ROWS = [name for name in _LOSSES if name != "byol"]


def _logistic(similarity: Tensor, temperature: float) -> Tensor:
    return -torch.log(1 / (1 + torch.exp(-similarity / temperature)))


def _row_loss(name: str, positive: Tensor, negatives: Tensor, setting: float) -> Tensor:
    """The loss of one row, from its similarity with its positive and those with its negatives."""
    if name == "nt-logistic":
        return _logistic(positive, setting) + torch.stack([_logistic(-s, setting) for s in negatives]).mean()
    if name == "semi-hard nt-logistic":
        semi_hard = [s for s in negatives if s < positive]
        apart = _logistic(-max(semi_hard), setting) if semi_hard else positive * 0
        return _logistic(positive, setting) + apart
    hinges = [torch.clamp(s - positive + setting, min=0) for s in negatives]
    if name == "margin":
        return torch.stack(hinges).mean()
    semi_hard = [
        (float(s.detach()), hinge) for s, hinge in zip(negatives, hinges, strict=True) if s < positive
    ]
    return max(semi_hard, key=lambda pair: pair[0])[1] if semi_hard else positive * 0


def _reference(name: str, first: Tensor, second: Tensor, setting: float) -> Tensor:
    if name == "byol":
        cosines = F.cosine_similarity(first.double(), second.double().detach(), dim=1)
        return (2 - 2 * cosines).mean()
    both = torch.cat([first, second]).double()
    rows = [row / row.norm() for row in both]
    losses = []
    for i, row in enumerate(rows):
        partner = (i + len(first)) % len(rows)
        others = [rows[j] @ row for j in range(len(rows)) if j not in (i, partner)]
        losses.append(_row_loss(name, rows[partner] @ row, torch.stack(others), setting))
    return torch.stack(losses).mean()


def _projections(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two views of n images, some alike and some not, of very different lengths."""
    generator = torch.Generator().manual_seed(n)
    first, noise = torch.randn(2, n, 6, generator=generator, dtype=torch.float64)
    second = first + noise * torch.linspace(0.1, 3, n)[:, None]
    lengths = torch.rand(2, n, 1, generator=generator, dtype=torch.float64) * 5 + 0.1
    return (first * lengths[0]).to(dtype), (second * lengths[1]).to(dtype)


def _encoder(dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 5).to(dtype)


def _loss_and_gradients(name: str, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
    """The loss of a shared encoder, and its gradients as DistributedDataParallel leaves them."""
    gather = ProcessGroupGather() if dist.is_initialized() else LocalGather()
    encoder = _encoder(first.dtype)
    model: Any = DistributedDataParallel(encoder) if dist.is_initialized() else encoder
    mine = [view.chunk(gather.world_size)[gather.rank] for view in (first, second)]
    one, other = model(torch.cat(mine)).chunk(2)
    loss, settings = _LOSSES[name]
    value = loss(one, other.detach() if name == "byol" else other, **settings, gather=gather)
    value.backward()
    return value.detach(), *(p.grad for p in encoder.parameters() if p.grad is not None)


def _expected(name: str, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
    encoder = _encoder(first.dtype).double()
    setting = next(iter(_LOSSES[name][1].values()), 0.0)
    value = _reference(name, encoder(first.double()), encoder(second.double()), setting)
    return value.detach(), *torch.autograd.grad(value, list(encoder.parameters()))


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", _LOSSES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_value_and_gradient_are_the_formulas_on_any_number_of_ranks(
    world_size: int, name: str, run_ranks: Callable
) -> None:
    views = _projections(28, torch.float64)
    expected = _expected(name, *views)
    for actual in run_ranks(_loss_and_gradients, world_size, name, *views):
        assert max(map(_relative_error, actual, expected)) < 1e-12


@pytest.mark.parametrize("name", _LOSSES)
def test_float32_under_autocast_is_as_exact_as_float32(name: str) -> None:
    views = _projections(30, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        projections = [view.clone().requires_grad_() for view in views]
        loss, settings = _LOSSES[name]
        other = projections[1].detach() if name == "byol" else projections[1]
        value = loss(projections[0], other, **settings)
    gradient = torch.autograd.grad(value, projections[0])[0]
    exact = views[0].double().requires_grad_()
    expected = _reference(name, exact, views[1], next(iter(settings.values()), 0.0))
    assert value.dtype == torch.float32
    assert _relative_error(value.detach(), expected.detach()) < 1e-6
    assert _relative_error(gradient, torch.autograd.grad(expected, exact)[0]) < 1e-5


@pytest.mark.parametrize("name", _OF_ROWS)
def test_rows_beyond_a_chunk_count_as_the_others_do(name: str) -> None:
    first, second = (view.requires_grad_() for view in _projections(300, torch.float64))
    rows = F.normalize(torch.cat([first, second]), dim=1)
    similarities = rows @ rows.T
    positive = similarities.diagonal(300).repeat(2)[:, None]
    apart = ~(torch.eye(600) + torch.eye(600).roll(300, 0)).bool()
    loss, settings = _LOSSES[name]
    setting = next(iter(settings.values()))
    if name == "nt-logistic":
        terms = F.softplus(-positive / setting) + F.softplus(similarities / setting)
        expected = terms[apart].mean()
    elif name == "margin":
        expected = (similarities - positive + setting).clamp_min(0)[apart].mean()
    elif name == "semi-hard nt-logistic":
        farther = similarities.where(apart & (similarities < positive), -torch.inf).max(1, keepdim=True)[0]
        expected = (F.softplus(-positive / setting) + F.softplus(farther / setting)).mean()
    else:
        farther = similarities.where(apart & (similarities < positive), -torch.inf).max(1, keepdim=True)[0]
        expected = (farther - positive + setting).clamp_min(0).mean()
    actual = loss(first, second, **settings)
    assert _relative_error(actual.detach(), expected.detach()) < 1e-12
    for mine, theirs in zip(
        torch.autograd.grad(actual, (first, second)),
        torch.autograd.grad(expected, (first, second)),
        strict=True,
    ):
        assert _relative_error(mine, theirs) < 1e-12


def test_negatives_nearer_than_the_positive_are_not_semi_hard() -> None:
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # Each row's positive points away from it, so that every negative is nearer.
    assert float(semi_hard_triplet(first, -first, margin=0.5)) == 0
    assert float(margin_triplet(first, -first, margin=0.5)) == pytest.approx(1.5)
    alone = float(F.softplus(torch.tensor(1 / 0.5)))
    assert float(semi_hard_nt_logistic(first, -first, temperature=0.5)) == pytest.approx(alone)


def test_byols_loss_is_nothing_for_equal_directions_and_four_for_opposite_ones() -> None:
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(byol_loss(rows, 3 * rows)) == pytest.approx(0, abs=1e-12)
    assert float(byol_loss(rows, -0.1 * rows)) == pytest.approx(4, rel=1e-12)


@pytest.mark.parametrize("name", _LOSSES)
def test_views_of_different_shapes_are_refused(name: str) -> None:
    loss, settings = _LOSSES[name]
    with pytest.raises(ValueError, match=r"same shape.*4, 8.*3, 8"):
        loss(torch.ones(4, 8), torch.ones(3, 8), **settings)


@pytest.mark.parametrize("name", _OF_ROWS)
def test_a_single_pair_is_refused(name: str) -> None:
    loss, settings = _LOSSES[name]
    with pytest.raises(ValueError, match="one pair has no negatives"):
        loss(torch.ones(1, 8), torch.ones(1, 8), **settings)
