"""Batch norm over real ranks against torch's own on the whole batch, in float64."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.views import Views
from training.config import EncoderConfig, ProjectorConfig
from training.gather import LocalGather, ProcessGroupGather
from training.losses import nt_xent
from training.models.batch_norm import GlobalBatchNorm, synchronize_batch_norm
from training.models.encoders import build_encoder
from training.models.heads import build_projector
from training.objectives import SimCLR

_SHAPES = {"maps": (12, 5, 3, 7), "vectors": (12, 5), "sequences": (12, 5, 4)}


def _layer(shape: tuple[int, ...]) -> nn.Module:
    """torch's layer, with a weight, a bias and a momentum of its own."""
    torch.manual_seed(0)
    layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](
        shape[1], eps=1e-3, momentum=0.3
    )
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer.double()


def _batches(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Two batches whose channels differ in mean and spread, and the gradients that come from above."""
    generator = torch.Generator().manual_seed(1)
    x, upstream = torch.randn(2, 2, *shape, generator=generator, dtype=torch.float64)
    channels = torch.arange(1.0, shape[1] + 1, dtype=torch.float64).view(1, 1, -1, *[1] * (len(shape) - 2))
    return x * channels + 3 * channels, upstream


def _passes(model: nn.Module, batches: Tensor, upstreams: Tensor) -> dict[str, Any]:
    """All that two forward and backward passes, and a third in evaluation mode, leave behind."""
    outputs, gradients = [], []
    for batch, upstream in zip(batches, upstreams, strict=True):
        x = batch.clone().requires_grad_()
        output = model(x)
        output.backward(upstream)
        outputs.append(output.detach())
        gradients.append(x.grad)
    evaluated = model.eval()(batches[0]).detach()
    return {
        "outputs": torch.stack(outputs),
        "gradients": torch.stack(gradients),
        "evaluated": evaluated,
        "parameter gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "state": model.state_dict(),
    }


def _passes_of_rank(shape: tuple[int, ...]) -> dict[str, Any]:
    gather = ProcessGroupGather()
    model = nn.Sequential(_layer(shape))
    synchronize_batch_norm(model, gather)
    assert isinstance(model[0], GlobalBatchNorm)
    return _passes(model, *(whole.chunk(gather.world_size, dim=1)[gather.rank] for whole in _batches(shape)))


def _assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", _SHAPES.values(), ids=_SHAPES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_normalise_as_torch_does_the_whole_batch(
    world_size: int, shape: tuple[int, ...], run_ranks: Callable
) -> None:
    expected = _passes(nn.Sequential(_layer(shape)), *_batches(shape))
    results = run_ranks(_passes_of_rank, world_size, shape)
    for name in ("outputs", "gradients"):
        _assert_close(torch.cat([result[name] for result in results], dim=1), expected[name])
    _assert_close(torch.cat([result["evaluated"] for result in results]), expected["evaluated"])
    for name, gradient in expected["parameter gradients"].items():
        parts = torch.stack([result["parameter gradients"][name] for result in results])
        _assert_close(parts.sum(0), gradient)
    for result in results:
        assert list(result["state"]) == list(expected["state"])
        for name, value in expected["state"].items():
            _assert_close(result["state"][name], value)


def _objective() -> SimCLR:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(name="resnet8"))
    projector = build_projector(ProjectorConfig(hidden_dim=24, dim=12), encoder.dim, "simclr")
    gather = ProcessGroupGather() if dist.is_initialized() else LocalGather()
    loss = partial(nt_xent, temperature=0.2, gather=gather)
    objective = SimCLR(encoder, projector, loss).double()
    synchronize_batch_norm(objective, gather)
    return objective


def _trained(views: tuple[Tensor, Tensor], steps: int) -> dict[str, Tensor]:
    """A SimCLR model after `steps` of SGD, each on 16 images; of one rank, where there are ranks."""
    objective = _objective()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = DistributedDataParallel(objective, broadcast_buffers=False) if world_size > 1 else objective
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for step in range(steps):
        images = tuple(view[step].chunk(world_size)[rank] for view in views)
        optimizer.zero_grad()
        model(Views(images, torch.zeros(0), torch.zeros(0).numpy())).backward()
        optimizer.step()
    return objective.state_dict()


def _images(steps: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    first, noise = torch.randn(2, steps, 16, 3, 8, 8, generator=generator, dtype=torch.float64)
    return first, first + noise


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_train_the_weights_that_one_process_trains(world_size: int, run_ranks: Callable) -> None:
    expected = _trained(_images(3), 3)
    untrained = _objective().state_dict()
    assert (expected["encoder.trunk.0.weight"] - untrained["encoder.trunk.0.weight"]).abs().max() > 1e-2
    for state in run_ranks(_trained, world_size, _images(3), 3):
        assert list(state) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-9)


def _features_with_weights_of(state: dict[str, Tensor], images: Tensor) -> tuple[list[str], Tensor]:
    objective = _objective()
    objective.load_state_dict(state)
    with torch.no_grad():
        return list(objective.state_dict()), objective.eval().encoder(images)


def test_checkpoints_move_between_one_process_and_several(run_ranks: Callable) -> None:
    state, images = _trained(_images(1), 1), _images(1)[0][0]
    names, features = _features_with_weights_of(state, images)
    for rank_names, rank_features in run_ranks(_features_with_weights_of, 2, state, images):
        assert rank_names == names
        torch.testing.assert_close(rank_features, features, rtol=1e-10, atol=1e-10)


def test_one_process_keeps_torchs_own_batch_norm() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    synchronize_batch_norm(model, LocalGather())
    assert type(model[0]) is nn.BatchNorm2d
