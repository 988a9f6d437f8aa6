"""A step with exact=true against one without, on 1, 2 and 4 workers.

    python benchmarks/exact.py                                          # ResNet-18, 32 pixels: 4 minutes
    python benchmarks/exact.py --device cuda --encoder resnet50 --stem imagenet --size 224 --workers 1

Workers are processes of this machine that divide its cores, connected by gloo; with CUDA there is one. Views
are noise in memory. Rounds of steps with and without alternate in the same processes. Prints the median of
the rounds with the lowest and highest, and the ratio of both.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # Before torch reads it.

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.comparison import Comparison, add_json_option, spread, write_json
from benchmarks.machine import CORES, add_device_option, chosen_device, describe, finish
from pipelines.config import DataConfig
from pipelines.index import Index
from pipelines.views import Views
from training.config import EncoderConfig, TrainConfig
from training.determinism import deterministic
from training.gather import Gather, LocalGather, ProcessGroupGather
from training.gradients import whole_batch
from training.models.batch_norm import synchronize_batch_norm
from training.models.exact import exact_lanes, make_exact
from training.objective_builder import build_objective
from training.optimizers import build_optimizer, set_learning_rate

_WARM_UP = 2


@dataclass(frozen=True)
class _Settings:
    """The config that is measured, steps of a round, rounds, and pixels along each side of a view."""

    config: TrainConfig
    device: torch.device
    steps: int
    rounds: int
    size: int


def _stepping(settings: _Settings, gather: Gather) -> Iterator[float]:
    """Seconds of each step of an objective of its own."""
    config, device, exact = settings.config, settings.device, settings.config.exact
    torch.manual_seed(config.seed)
    objective = build_objective(config, Index("", "folder", pa.table({})), LocalGather() if exact else gather)
    objective.to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    model: nn.Module = objective
    if exact:
        make_exact(objective, exact_lanes(config, gather))
    elif gather.world_size > 1:
        model = DistributedDataParallel(synchronize_batch_norm(objective, gather), broadcast_buffers=False)
    optimizer = build_optimizer(objective, config.optimizer)
    set_learning_rate(optimizer, 0.01)
    half = device.type == "cuda" and not exact
    backward = whole_batch(model, dtype=torch.bfloat16 if half else torch.float32)
    n, size = config.batch_size // gather.world_size, settings.size
    images = torch.randn(2, n, 3, size, size, device=device)
    first, second = (view.contiguous(memory_format=torch.channels_last) for view in images)
    views = Views((first, second), torch.zeros(n, dtype=torch.int64), np.arange(n))
    while True:
        started = time.perf_counter()
        with deterministic(exact=exact, device=device):
            optimizer.zero_grad(set_to_none=True)
            backward(views)
            optimizer.step()
        finish(device)
        yield time.perf_counter() - started


def _measure(settings: _Settings, gather: Gather) -> list[tuple[float, float]]:
    """Median seconds of a step without and with exact, for each round."""
    without = _stepping(settings, gather)
    exact = _stepping(replace(settings, config=replace(settings.config, exact=True)), gather)
    for _ in range(_WARM_UP):
        next(without)
        next(exact)
    return [
        (
            statistics.median(next(without) for _ in range(settings.steps)),
            statistics.median(next(exact) for _ in range(settings.steps)),
        )
        for _ in range(settings.rounds)
    ]


def _rank(rank: int, workers: int, settings: _Settings, folder: str) -> None:
    torch.set_num_threads(max(1, CORES // workers))
    gather: Gather = LocalGather()
    if workers > 1:
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=workers)
        gather = ProcessGroupGather()
    rounds = _measure(settings, gather)
    if rank == 0:
        np.save(Path(folder, "rounds.npy"), rounds)
    if workers > 1:
        dist.barrier()
        dist.destroy_process_group()


def _compare(settings: _Settings, workers: int) -> Comparison:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (workers, settings, folder), nprocs=workers)  # pyright: ignore[reportPrivateImportUsage]
        without, exact = np.load(Path(folder, "rounds.npy")).T.tolist()
    ratios = [one / other for one, other in zip(exact, without, strict=True)]
    print(
        f"{workers} workers: {spread(without, '.3f')} s a step, exact {spread(exact, '.3f')} s, "
        f"ratio {spread(ratios, '.2f')}",
        flush=True,
    )
    return Comparison(f"an exact step, {workers} workers", "without exact", "s", exact, without)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--stem", choices=["imagenet", "cifar"], default="cifar", help="encoder.stem")
    parser.add_argument("--size", type=int, default=32, help="pixels along each side of a view")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=3, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    add_device_option(parser)
    add_json_option(parser)
    given = parser.parse_args()
    device = chosen_device(given.device)
    if device.type == "cuda" and given.workers != [1]:
        parser.error("--device cuda measures one worker; give --workers 1")
    print(describe(device, "torch"))
    encoder = EncoderConfig(name=given.encoder, stem=given.stem)
    config = TrainConfig(data=DataConfig(train=""), batch_size=given.batch_size, encoder=encoder)
    settings = _Settings(config, device, given.steps, given.rounds, given.size)
    write_json(given.json, [_compare(settings, workers) for workers in given.workers])


if __name__ == "__main__":
    main()
