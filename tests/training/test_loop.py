"""fit() against a loop written by hand."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.views import Views
from training.errors import NonFiniteError
from training.gradients import whole_batch
from training.loop import fit

_CPU = torch.device("cpu")


class _Regression(nn.Module):
    """A linear map and its mean squared error."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(12, 1)

    def forward(self, views: Views) -> Tensor:
        return F.mse_loss(self.linear(views.images[0].flatten(1))[:, 0], views.labels)


def _batches(start: int = 0) -> Iterator[Views]:
    """Batches without end, whose labels a linear map gives exactly."""
    step = start
    while True:
        images = torch.randn(16, 3, 2, 2, generator=torch.Generator().manual_seed(step))
        labels = images.flatten(1) @ torch.linspace(-1, 1, 12) + 0.5
        yield Views((images,), labels, labels.numpy())
        step += 1


def _rate(step: int) -> float:
    return 0.1 / (1 + step)


def _fit(
    model: nn.Module, views: Iterator[Views], start: int, stop: int, clip_norm: float | None = None
) -> list[tuple[int, float, float]]:
    """Train, and give what after_step got."""
    calls: list[tuple[int, float, float]] = []
    fit(
        model,
        whole_batch(model, dtype=torch.float32),
        torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9),
        views,
        start_step=start,
        stop_step=stop,
        rate=_rate,
        after_step=lambda done, loss, rate: calls.append((done, float(loss), rate)),
        device=_CPU,
        clip_norm=clip_norm,
    )
    return calls


def test_weights_and_losses_are_those_of_a_loop_by_hand() -> None:
    model, by_hand = _Regression(), _Regression().linear
    calls = _fit(model, _batches(), 0, 30)
    losses = []
    velocity = [torch.zeros_like(parameter) for parameter in by_hand.parameters()]
    for step, batch in enumerate(islice(_batches(), 30)):
        loss = ((by_hand(batch.images[0].flatten(1))[:, 0] - batch.labels) ** 2).mean()
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        losses.append(loss.item())
        with torch.no_grad():
            for parameter, v, gradient in zip(by_hand.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(gradient)
                parameter.add_(v, alpha=-_rate(step))
    assert calls == [(step + 1, loss, _rate(step)) for step, loss in enumerate(losses)]
    assert torch.equal(model.linear.weight, by_hand.weight)
    assert torch.equal(model.linear.bias, by_hand.bias)


def test_a_known_problem_is_solved() -> None:
    model = _Regression()
    _fit(model, _batches(), 0, 300)
    torch.testing.assert_close(model.linear.weight[0], torch.linspace(-1, 1, 12), rtol=0, atol=1e-2)
    assert float(model.linear.bias.detach()) == pytest.approx(0.5, abs=1e-2)


def test_no_batch_is_taken_beyond_the_last_step() -> None:
    views = _batches(start=4)
    calls = _fit(_Regression(), views, 4, 7)
    assert [done for done, _, _ in calls] == [5, 6, 7]
    assert torch.equal(next(views).images[0], next(_batches(start=7)).images[0])


def test_data_that_end_early_are_an_error_that_names_the_step() -> None:
    with pytest.raises(RuntimeError, match="step 3 of 5"):
        _fit(_Regression(), islice(_batches(), 3), 0, 5)


def test_a_model_left_in_evaluation_mode_is_trained_in_training_mode() -> None:
    model = _Regression().eval()
    _fit(model, _batches(), 0, 1)
    assert model.training


def test_gradients_are_clipped_all_together_where_they_are_longer() -> None:
    model, by_hand = _Regression(), _Regression()
    _fit(model, _batches(), 0, 1, clip_norm=0.01)
    by_hand(next(_batches())).backward()
    gradients = [parameter.grad for parameter in by_hand.parameters() if parameter.grad is not None]
    length = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert length > 0.01
    for parameter, before in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert before.grad is not None
        torch.testing.assert_close(parameter, before - _rate(0) * before.grad * 0.01 / length)


class _Normalised(_Regression):
    """With a batch norm before it, whose statistics must not keep what is skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(12)

    def forward(self, views: Views) -> Tensor:
        return F.mse_loss(self.linear(self.norm(views.images[0].flatten(1)))[:, 0], views.labels)


def _poisoned(bad: set[int]) -> Iterator[Views]:
    for step, batch in enumerate(_batches()):
        yield replace(batch, images=(batch.images[0] * torch.nan,)) if step in bad else batch


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    model, expected = _Normalised(), _Normalised()
    calls = _fit(model, _poisoned({3, 4, 7}), 0, 10)
    assert [done for done, loss, _ in calls if not math.isfinite(loss)] == [4, 5, 8]
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.0, momentum=0.9)
    for step, batch in enumerate(islice(_batches(), 10)):
        if step not in (3, 4, 7):
            optimizer.param_groups[0]["lr"] = _rate(step)
            optimizer.zero_grad()
            expected(batch).backward()
            optimizer.step()
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_several_steps_in_a_row_that_are_not_finite_end_the_fit() -> None:
    with pytest.raises(NonFiniteError, match="not finite in steps 5 to 7"):
        _fit(_Normalised(), _poisoned({1, 2, 4, 5, 6}), 0, 10)
