"""NT-Xent and DCL against the same losses written out in float64, in one process and over real ranks."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from training.gather import ProcessGroupGather
from training.losses import dcl, nt_xent

_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def _reference(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Cross entropy over the full matrix of similarities, each row's class being its positive's column."""
    rows = F.normalize(torch.cat([first, second]).double(), dim=1)
    itself = torch.eye(len(rows), dtype=torch.bool)
    logits = (rows @ rows.T / temperature).masked_fill(itself, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(rows)).roll(len(first)))


def _decoupled_reference(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Yeh et al. 2022, eq. 6, over the full matrix of similarities: the positive is not in the sum either."""
    rows = F.normalize(torch.cat([first, second]).double(), dim=1)
    logits = rows @ rows.T / temperature
    itself = torch.eye(len(rows), dtype=torch.bool)
    positive = itself.roll(len(first), dims=0)
    sums = logits.masked_fill(itself | positive, -torch.inf).logsumexp(1)
    return (sums - logits[positive]).mean()


_REFERENCES = {nt_xent: _reference, dcl: _decoupled_reference}
both_losses = pytest.mark.parametrize("loss", list(_REFERENCES), ids=lambda loss: loss.__name__)


def _reference_gradients(
    first: Tensor, second: Tensor, temperature: float, loss: Callable[..., Tensor] = nt_xent
) -> tuple[Tensor, tuple[Tensor, ...]]:
    views = first.double().requires_grad_(), second.double().requires_grad_()
    value = _REFERENCES[loss](views[0], views[1], temperature)
    return value.detach(), torch.autograd.grad(value, views)


def _projections(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two views of n images: alike, and of very different lengths."""
    generator = torch.Generator().manual_seed(n)
    first, noise = torch.randn(2, n, 16, generator=generator, dtype=torch.float64)
    lengths = torch.rand(2, n, 1, generator=generator, dtype=torch.float64) * 5 + 0.1
    return (first * lengths[0]).to(dtype), ((first + noise) * lengths[1]).to(dtype)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def _loss_and_gradients(
    first: Tensor, second: Tensor, temperature: float, loss: Callable[..., Tensor] = nt_xent
) -> tuple[Tensor, Tensor, Tensor]:
    """What one rank gets, with its own share of the rows."""
    gather = ProcessGroupGather()
    mine = [view.chunk(gather.world_size)[gather.rank].clone().requires_grad_() for view in (first, second)]
    value = loss(mine[0], mine[1], temperature=temperature, gather=gather)
    first_gradient, second_gradient = torch.autograd.grad(value, mine)
    return value.detach(), first_gradient, second_gradient


# At 1,100 every one of four ranks has 550 rows, which is more than a block's 512.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("n", [4, 12, 36, 1100])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@both_losses
def test_value_and_gradient_are_those_of_the_full_matrix(
    loss: Callable[..., Tensor], world_size: int, n: int, dtype: torch.dtype, run_ranks: Callable
) -> None:
    first, second = _projections(n, dtype)
    expected_loss, expected_gradients = _reference_gradients(first, second, 0.1, loss)
    results = run_ranks(_loss_and_gradients, world_size, first, second, 0.1, loss)
    for value, *_ in results:
        assert value.dtype == dtype
        # DCL may be next to nothing, the difference of two terms that are not.
        assert float((value - expected_loss).abs()) < _TOLERANCE[dtype] * max(1, float(expected_loss.abs()))
    for view, expected in enumerate(expected_gradients, start=1):
        # DistributedDataParallel divides by the number of ranks, so each rank's gradient is that much larger.
        gradient = torch.cat([result[view] for result in results]) / world_size
        assert _relative_error(gradient, expected) < _TOLERANCE[dtype]


# Below 0.02 exponentials leave float32.
@pytest.mark.parametrize("temperature", [0.002, 0.02, 0.05, 0.5, 1.0])
@both_losses
def test_one_process_needs_no_process_group_at_any_temperature(
    loss: Callable[..., Tensor], temperature: float
) -> None:
    views = [view.requires_grad_() for view in _projections(36, torch.float64)]
    expected_loss, expected_gradients = _reference_gradients(
        *_projections(36, torch.float64), temperature, loss
    )
    value = loss(*views, temperature=temperature)
    assert _relative_error(value.detach(), expected_loss) < 1e-11
    for gradient, expected in zip(torch.autograd.grad(value, views), expected_gradients, strict=True):
        assert _relative_error(gradient, expected) < 1e-11


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5])
def test_views_that_agree_cost_no_digits_in_float32(temperature: float) -> None:
    first, _ = _projections(300, torch.float32)
    second = first + 0.05 * torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    expected_loss, expected_gradients = _reference_gradients(first, second, temperature)
    views = first.requires_grad_(), second.requires_grad_()
    loss = nt_xent(*views, temperature=temperature)
    assert loss.dtype == torch.float32
    assert _relative_error(loss.detach(), expected_loss) < 1e-6
    for gradient, expected in zip(torch.autograd.grad(loss, views), expected_gradients, strict=True):
        assert _relative_error(gradient, expected) < 1e-6


class _LargestTensor(TorchDispatchMode):
    """Notes the most numbers that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@both_losses
def test_no_matrix_grows_with_the_square_of_the_pairs(loss: Callable[..., Tensor]) -> None:
    largest = []
    for n in (600, 1100):
        views = [view.requires_grad_() for view in _projections(n, torch.float32)]
        with _LargestTensor() as watch:
            torch.autograd.grad(loss(*views, temperature=0.1), views)
        largest.append(watch.numbers)
    assert largest == [512 * 512] * 2


def test_temperatures_whose_exponentials_leave_float64_are_refused() -> None:
    with pytest.raises(ValueError, match=r"temperature=0.001 is below 0.002"):
        nt_xent(torch.ones(4, 8), torch.ones(4, 8), temperature=0.001)


def _linear_encoder() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 8).double()


def _encoder_gradients(first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a shared encoder's parameters, as DistributedDataParallel leaves them on one rank."""
    gather = ProcessGroupGather()
    encoder = _linear_encoder()
    mine = [view.chunk(gather.world_size)[gather.rank] for view in (first, second)]
    model = DistributedDataParallel(encoder)
    first, second = model(torch.cat(mine)).chunk(2)
    nt_xent(first, second, temperature=0.1, gather=gather).backward()
    return tuple(parameter.grad for parameter in encoder.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_give_the_single_process_gradient_of_shared_weights(
    world_size: int, run_ranks: Callable
) -> None:
    first, second = _projections(36, torch.float64)
    encoder = _linear_encoder()
    expected = torch.autograd.grad(
        _reference(encoder(first), encoder(second), 0.1), list(encoder.parameters())
    )
    for gradients in run_ranks(_encoder_gradients, world_size, first, second):
        assert max(map(_relative_error, gradients, expected)) < 1e-12


@both_losses
def test_gradient_is_that_of_finite_differences(loss: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    views = [
        torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)
    ]
    assert torch.autograd.gradcheck(lambda first, second: loss(first, second, temperature=0.5), views)


@pytest.mark.parametrize("n", [3, 50, 300])
def test_equal_similarities_give_the_loss_of_chance(n: int) -> None:
    projections = torch.eye(2 * n, dtype=torch.float64)
    loss = nt_xent(projections[:n], projections[n:], temperature=0.1)
    assert float(loss) == pytest.approx(math.log(2 * n - 1), rel=1e-12)
    decoupled = dcl(projections[:n], projections[n:], temperature=0.1)
    assert float(decoupled) == pytest.approx(math.log(2 * n - 2), rel=1e-12)


def _gradients_in_autocast(first: Tensor, second: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """As _loss_and_gradients, forward and backward within bfloat16's autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        assert (first @ second.T).dtype == torch.bfloat16
        return _loss_and_gradients(first, second, temperature)


# 516 images make 1,032 rows in one process, 8 more than two blocks.
@pytest.mark.parametrize("n", [36, 516])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_autocast_does_not_lower_the_precision_inside(world_size: int, n: int, run_ranks: Callable) -> None:
    first, second = _projections(n, torch.float32)
    expected_loss, expected_gradients = _reference_gradients(first, second, 0.1)
    results = run_ranks(_gradients_in_autocast, world_size, first, second, 0.1)
    for loss, *_ in results:
        assert loss.dtype == torch.float32
        assert _relative_error(loss, expected_loss) < 1e-6
    for view, expected in enumerate(expected_gradients, start=1):
        gradient = torch.cat([result[view] for result in results]) / world_size
        assert _relative_error(gradient, expected) < 1e-6


@both_losses
def test_bfloat16_projections_are_scored_in_float32(loss: Callable[..., Tensor]) -> None:
    first, second = _projections(36, torch.bfloat16)
    value = loss(first, second, temperature=0.1)
    assert value.dtype == torch.float32
    assert _relative_error(value, _REFERENCES[loss](first, second, 0.1)) < 1e-6


@both_losses
def test_views_of_different_shapes_are_refused(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"same shape.*4, 8.*3, 8"):
        loss(torch.ones(4, 8), torch.ones(3, 8), temperature=0.1)


@both_losses
def test_a_single_pair_is_refused(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="one pair has no negatives"):
        loss(torch.ones(1, 8), torch.ones(1, 8), temperature=0.1)
