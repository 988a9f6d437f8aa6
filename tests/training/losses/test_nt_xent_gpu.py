"""NT-Xent on a GPU against the same loss written out in float64 there, in float32 and under autocast."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from training.losses import nt_xent

pytestmark = pytest.mark.gpu

# Sums of some ten thousand float32 numbers in another order than the reference's.
_TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}


def _reference(first: Tensor, second: Tensor, temperature: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Cross entropy over the full matrix of similarities, and its gradients."""
    views = first.detach().double().requires_grad_(), second.detach().double().requires_grad_()
    rows = F.normalize(torch.cat(views), dim=1)
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    logits = (rows @ rows.T / temperature).masked_fill(itself, -torch.inf)
    loss = F.cross_entropy(logits, torch.arange(len(rows), device=rows.device).roll(len(first)))
    return loss.detach(), torch.autograd.grad(loss, views)


def _projections(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two views of n images: alike, and of very different lengths."""
    generator = torch.Generator().manual_seed(n)
    first, noise = torch.randn(2, n, 128, generator=generator, dtype=torch.float64)
    lengths = torch.rand(2, n, 1, generator=generator, dtype=torch.float64) * 5 + 0.1
    first, second = first * lengths[0], (first + noise) * lengths[1]
    return first.to("cuda", dtype).requires_grad_(), second.to("cuda", dtype).requires_grad_()


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


# At 5,000 pairs there are 10,000 rows, which is more than two blocks of 4,096.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("n", [12, 2048, 5000])
def test_value_and_gradient_are_those_of_the_full_matrix(n: int, dtype: torch.dtype):
    views = _projections(n, dtype)
    expected_loss, expected = _reference(*views, 0.1)
    loss = nt_xent(*views, temperature=0.1)
    assert loss.dtype == dtype
    assert _relative_error(loss.detach(), expected_loss) < _TOLERANCE[dtype]
    for gradient, right in zip(torch.autograd.grad(loss, views), expected, strict=True):
        assert _relative_error(gradient, right) < _TOLERANCE[dtype]


@pytest.mark.parametrize("temperature", [0.02, 0.05, 0.5, 1.0])
def test_float32_suffices_at_any_temperature_it_is_used_at(temperature: float):
    views = _projections(600, torch.float32)
    expected_loss, expected = _reference(*views, temperature)
    loss = nt_xent(*views, temperature=temperature)
    assert _relative_error(loss.detach(), expected_loss) < 1e-5
    for gradient, right in zip(torch.autograd.grad(loss, views), expected, strict=True):
        # A similarity's error of 1e-7 is one of 1e-7 / temperature in its exponential.
        assert _relative_error(gradient, right) < 1e-6 / temperature


@pytest.mark.parametrize("n", [36, 5000])
def test_autocast_does_not_lower_the_precision_inside(n: int):
    views = _projections(n, torch.float32)
    expected_loss, expected = _reference(*views, 0.1)
    with torch.autocast("cuda", torch.bfloat16):
        assert (views[0] @ views[1].T).dtype == torch.bfloat16
        loss = nt_xent(*views, temperature=0.1)
        gradients = torch.autograd.grad(loss, views)
    assert loss.dtype == torch.float32
    assert _relative_error(loss.detach(), expected_loss) < 5e-6
    for gradient, right in zip(gradients, expected, strict=True):
        assert _relative_error(gradient, right) < 5e-6


def test_bfloat16_projections_are_scored_in_float32():
    views = _projections(600, torch.bfloat16)
    loss = nt_xent(*views, temperature=0.1)
    assert loss.dtype == torch.float32
    assert _relative_error(loss.detach(), _reference(*views, 0.1)[0]) < 5e-6


def test_memory_grows_with_the_pairs_and_not_with_their_square():
    peaks = []
    for n in (8192, 16384):
        views = _projections(n, torch.float32)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(nt_xent(*views, temperature=0.1), views)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    # The full matrix would be 4 GiB; two blocks of 4,096 and a dozen copies of the rows are 0.4 GB.
    assert peaks[1] < 4e8
    assert peaks[1] < 2 * peaks[0]


def test_equal_similarities_give_the_loss_of_chance():
    projections = torch.eye(600, device="cuda")
    loss = nt_xent(projections[:300], projections[300:], temperature=0.1)
    assert float(loss) == pytest.approx(math.log(599), rel=1e-6)
