"""LARS against the papers' updates written out in NumPy; weight decay's reach; the learning rate's course."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from pipelines.config import DataConfig
from training.config import EncoderConfig, OptimizerConfig, ProjectorConfig, TrainConfig
from training.models.encoders import build_encoder
from training.models.heads import build_projector
from training.optimizers import LARS, build_optimizer, learning_rate, peak_learning_rate, set_learning_rate

_TRUST, _MOMENTUM = 0.001, 0.9

Array = np.ndarray
Ratio = Callable[[Array, Array, float], float]


def test_nesterovs_momentum_looks_ahead() -> None:
    # w = v = 0 and a gradient of 1 twice: velocity 1, 1.9; a step is gradient + momentum x velocity.
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = build_optimizer(model, OptimizerConfig(name="sgd", nesterov=True, weight_decay=0.0))
    set_learning_rate(optimizer, 0.1)
    for _ in range(2):
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
    assert float(model.weight.detach()) == pytest.approx(-0.1 * ((1 + 0.9) + (1 + 0.9 * 1.9)))


def _trust_of_you_et_al(weights: Array, gradient: Array, decay: float) -> float:
    """You et al. 2017, eq. 6."""
    weight_norm, gradient_norm = np.linalg.norm(weights), np.linalg.norm(gradient)
    return float(_TRUST * weight_norm / (gradient_norm + decay * weight_norm))


def _trust_of_simclr(weights: Array, gradient: Array, decay: float) -> float:
    """LARSOptimizer of github.com/google-research/simclr: the norm is that of gradient and decay together."""
    return float(_TRUST * np.linalg.norm(weights) / np.linalg.norm(gradient + decay * weights))


def _numpy_lars(
    weights: Array, gradients: Array, rates: Sequence[float], decay: float, trust: Ratio
) -> Array:
    """You et al. 2017, algorithm 1: the learning rate of each step goes into the velocity."""
    velocity = np.zeros_like(weights)
    for gradient, rate in zip(gradients, rates, strict=True):
        local = rate * trust(weights, gradient, decay)
        velocity = _MOMENTUM * velocity + local * (gradient + decay * weights)
        weights = weights - velocity
    return weights


def _lars(weights: Array, gradients: Array, rates: Sequence[float], decay: float) -> Array:
    parameter = nn.Parameter(torch.tensor(weights))
    optimizer = LARS([parameter], lr=0.0, momentum=_MOMENTUM, weight_decay=decay)
    for gradient, rate in zip(gradients, rates, strict=True):
        set_learning_rate(optimizer, rate)
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    return parameter.detach().numpy()


def _problem(steps: int) -> tuple[Array, Array]:
    random = np.random.default_rng(0)
    return random.normal(size=(6, 5)), random.normal(size=(steps, 6, 5))


def test_lars_takes_the_papers_steps() -> None:
    weights, gradients = _problem(8)
    expected = _numpy_lars(weights, gradients, [30.0] * 8, 0.0, _trust_of_you_et_al)
    np.testing.assert_allclose(_lars(weights, gradients, [30.0] * 8, 0.0), expected, rtol=1e-12)


def test_lars_decays_weights_as_simclr_does() -> None:
    weights, gradients = _problem(8)
    expected = _numpy_lars(weights, gradients, [30.0] * 8, 0.3, _trust_of_simclr)
    np.testing.assert_allclose(_lars(weights, gradients, [30.0] * 8, 0.3), expected, rtol=1e-12)


def test_simclrs_weight_decay_makes_the_two_ratios_one() -> None:
    weights, gradients = _problem(1)
    theirs = _trust_of_you_et_al(weights, gradients[0], 1e-6)
    assert theirs == pytest.approx(_trust_of_simclr(weights, gradients[0], 1e-6), rel=1e-5)


def test_lars_takes_the_papers_steps_while_the_learning_rate_changes() -> None:
    weights, gradients = _problem(8)
    rates = [learning_rate(step, peak=30.0, steps=8, warmup_steps=3) for step in range(8)]
    expected = _numpy_lars(weights, gradients, rates, 0.0, _trust_of_you_et_al)
    np.testing.assert_allclose(_lars(weights, gradients, rates, 0.0), expected, rtol=1e-9)


def test_lars_steps_out_of_weights_that_are_all_zero() -> None:
    _, gradients = _problem(1)
    stepped = _lars(np.zeros((6, 5)), gradients, [0.1], 1e-6)
    np.testing.assert_allclose(stepped, -0.1 * gradients[0], rtol=1e-12)


def _model() -> nn.Module:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(name="resnet8"))
    model = nn.Sequential(
        encoder, build_projector(ProjectorConfig(hidden_dim=8, dim=4), encoder.dim, "simclr")
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def _change(name: Any, gradient: float, **fields: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(before, after) of each parameter in one step of rate 0.1, all gradients being `gradient`."""
    model = _model()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(name=name, **fields))
    set_learning_rate(optimizer, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    return {key: (before[key], value.detach()) for key, value in model.named_parameters()}


def _is_weight(key: str) -> bool:
    """Weights of convolutions and linear layers; in this model all others are batch norms'."""
    module = _model().get_submodule(key.rpartition(".")[0])
    return isinstance(module, (nn.Conv2d, nn.Linear)) and key.endswith(".weight")


# In one step without a gradient, what becomes of a weight under a decay of 0.5 and a rate of 0.1.
@pytest.mark.parametrize(("name", "factor"), [("lars", 1 - 0.1 * _TRUST), ("sgd", 0.95), ("adamw", 0.95)])
def test_weight_decay_shrinks_weights_and_leaves_batch_norm_alone(name: str, factor: float) -> None:
    for key, (before, after) in _change(name, 0.0, weight_decay=0.5).items():
        torch.testing.assert_close(after, before * factor if _is_weight(key) else before, rtol=1e-6, atol=0)


def test_lars_adapts_weights_and_takes_batch_norms_gradients_as_they_are() -> None:
    for key, (before, after) in _change("lars", 2.0, weight_decay=0.0).items():
        if key == "1.4.bias":  # The projector's last shift is not trained.
            assert torch.equal(after, before)
        elif _is_weight(key):
            assert float((after - before).norm()) == pytest.approx(
                0.1 * _TRUST * float(before.norm()), rel=1e-3
            )
        else:
            torch.testing.assert_close(after, before - 0.2)


def test_every_trained_parameter_is_in_one_group_once() -> None:
    model = _model()
    for name in ("lars", "sgd", "adamw"):
        groups = build_optimizer(model, OptimizerConfig(name=name)).param_groups
        held = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_learning_rate_rises_in_equal_steps_from_zero_to_its_peak() -> None:
    rates = [learning_rate(step, peak=2.0, steps=100, warmup_steps=10) for step in range(11)]
    # google-research/simclr, model_util.py: global_step / warmup_steps * scaled_lr below warmup_steps.
    assert rates == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0])


def test_learning_rate_decays_as_torchs_cosine_does() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = CosineAnnealingLR(optimizer, T_max=90)
    for step in range(10, 100):
        assert learning_rate(step, peak=2.0, steps=100, warmup_steps=10) == pytest.approx(
            schedule.get_last_lr()[0]
        )
        optimizer.step()
        schedule.step()


def test_learning_rate_falls_from_step_to_step_to_almost_nothing() -> None:
    rates = [learning_rate(step, peak=2.0, steps=1000, warmup_steps=100) for step in range(100, 1000)]
    assert all(later < earlier for earlier, later in pairwise(rates))
    assert 0 < rates[-1] < 1e-5 * rates[0]


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    assert learning_rate(0, peak=2.0, steps=10, warmup_steps=0) == 2.0


@pytest.mark.parametrize("batch_size", [64, 256, 4096])
def test_learning_rate_follows_the_batch_as_in_simclr(batch_size: int) -> None:
    def peak(**fields: Any) -> float:
        data = DataConfig(train="x")
        return peak_learning_rate(
            TrainConfig(data=data, batch_size=batch_size, optimizer=OptimizerConfig(**fields))
        )

    # Chen et al. 2020, appendix B.1: 0.3 * B / 256, or 0.075 * sqrt(B).
    assert peak(learning_rate=0.3, scaling="linear") == pytest.approx(0.3 * batch_size / 256)
    assert peak(learning_rate=0.075 * 16, scaling="sqrt") == pytest.approx(0.075 * math.sqrt(batch_size))
    assert peak(learning_rate=0.3, scaling="none") == 0.3
