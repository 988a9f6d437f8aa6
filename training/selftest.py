"""Self-tests of workers: correct gradients, the speed of their connection, the bits of an exact step."""

import statistics
import time
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.config import DataConfig
from pipelines.index import Index
from pipelines.views import Views
from training.config import EncoderConfig, TrainConfig
from training.determinism import deterministic
from training.gather import Gather, LocalGather
from training.gradients import whole_batch
from training.losses import nt_xent
from training.models.exact import exact_lanes, make_exact
from training.objective_builder import build_objective
from training.optimizers import build_optimizer, set_learning_rate

# Rows of each worker, and the dimension of a projection.
_ROWS, _DIM, _TEMPERATURE = 16, 32, 0.1

_BYTES, _ROUNDS = 16 * 2**20, 5

# Images of an exact step, pixels along each side, and steps.
_IMAGES, _SIDE, _STEPS = 8, 32, 2


def gradient_error(gather: Gather, device: torch.device) -> float:
    """Largest difference between the gathered NT-Xent's gradients and one process's, relative to the largest.

    All workers call it and get the same value. Computed in float64, so that only an error in the collectives
    or the loss exceeds 1e-12. The reference is the full matrix of the whole batch, Chen et al. 2020, eq. 1.
    """
    first, second = _projections(gather.world_size, device)
    here = slice(gather.rank * _ROWS, (gather.rank + 1) * _ROWS)
    mine = first[here].clone().requires_grad_(), second[here].clone().requires_grad_()
    nt_xent(*mine, temperature=_TEMPERATURE, gather=gather).backward()
    together = torch.cat([gather.rows(_gradient(view)) for view in mine]) / gather.world_size
    whole = first.requires_grad_(), second.requires_grad_()
    _whole_batch(*whole).backward()
    alone = torch.cat([_gradient(view) for view in whole])
    return float((together - alone).abs().max() / alone.abs().max())


def all_gather_rate(gather: Gather, device: torch.device) -> float:
    """Bytes per second that each worker receives as all gather 16 MiB from each; the median of five runs."""
    rows = torch.ones(_BYTES // 4, device=device)
    seconds = []
    for _ in range(_ROUNDS + 1):
        began = time.perf_counter()
        float(gather.rows(rows)[-1])  # Waits for a GPU.
        seconds.append(time.perf_counter() - began)
    return (gather.world_size - 1) * _BYTES / statistics.median(seconds[1:])


def exact_bits(device: torch.device) -> str:
    """Digest of a ResNet-18's weights after two steps of exact SimCLR on noise, as 16 hexadecimal digits.

    Machines with the same digest give the same bits, as far as this network shows.
    """
    encoder = EncoderConfig(name="resnet18")
    config = TrainConfig(data=DataConfig(train=""), exact=True, lanes=2, batch_size=_IMAGES, encoder=encoder)
    with deterministic(exact=True, device=device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        objective = build_objective(config, Index("", "folder", pa.table({})), LocalGather()).to(device)
        make_exact(objective, exact_lanes(config, LocalGather()))
        optimizer = build_optimizer(objective, config.optimizer)
        set_learning_rate(optimizer, 0.1)
        backward = whole_batch(objective, dtype=torch.float32)
        for _ in range(_STEPS):
            first, second = torch.rand(2, _IMAGES, 3, _SIDE, _SIDE).to(device)
            optimizer.zero_grad(set_to_none=True)
            backward(Views((first, second), torch.zeros(_IMAGES, dtype=torch.int64), np.arange(_IMAGES)))
            optimizer.step()
    weights = (parameter.detach().cpu().numpy().tobytes() for parameter in objective.parameters())
    return blake2b(b"".join(weights), digest_size=8).hexdigest()


def _projections(world_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, world_size * _ROWS, _DIM, generator=generator, dtype=torch.float64)
    return first.to(device), second.to(device)


def _whole_batch(first: Tensor, second: Tensor) -> Tensor:
    rows = F.normalize(torch.cat([first, second]), dim=1)
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    logits = (rows @ rows.T / _TEMPERATURE).masked_fill(itself, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(rows), device=rows.device).roll(len(first)))


def _gradient(view: Tensor) -> Tensor:
    assert view.grad is not None
    return view.grad
