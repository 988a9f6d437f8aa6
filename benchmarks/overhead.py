"""What `diptych train` adds to a step, against plain DistributedDataParallel with its views in memory.

    python benchmarks/overhead.py CIFAR10    # a folder of Parquet files train-*: image, label

Two workers on this machine, each with half of its cores; the same networks, loss, optimiser and batch, in
turns. diptych's steps read, decode and augment their images, and are timed by its own metrics.jsonl from the
tenth step on. Prints the ratio of the medians of both for each round, where diptych's time goes, and the
seconds from the command to the first step.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # Before torch reads it.

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from benchmarks.comparison import Comparison, add_json_option, write_json
from cluster.local import cluster
from cluster.train import run_training
from pipelines.config import DataConfig
from pipelines.feed import Device, training_views
from pipelines.plan import lanes_of
from pipelines.reader import read_windows
from pipelines.sources import build_index
from pipelines.views import Views
from training.batch_norm import synchronize_batch_norm
from training.config import TrainConfig
from training.gather import ProcessGroupGather
from training.gradients import whole_batch
from training.objectives import build_objective
from training.optimizers import build_optimizer, set_learning_rate
from training.run import make_plan

_WORKERS = 2
_THREADS = max(1, (os.cpu_count() or 1) // _WORKERS)
_WARM_UP = 10

# Batches that are held in memory, and taken again and again.
_HELD = 4


def _config(arguments: argparse.Namespace, output: str, name: str) -> TrainConfig:
    data = DataConfig(train=f"{arguments.cifar10}/train-*", recipe="simclr-cifar")
    settings: dict[str, Any] = {
        "encoder": {"name": arguments.encoder},
        "projector": {"hidden_dim": 256, "dim": 64},
        "optimizer": {"name": "sgd", "learning_rate": 0.03},
        "evaluation": {"diagnostic_images": 0},
    }
    return TrainConfig(
        data=data, output=output, name=name, workers=_WORKERS, batch_size=arguments.batch_size,
        steps=arguments.steps, **settings,
    )  # fmt: skip


def _diptych(config: TrainConfig) -> tuple[list[dict[str, Any]], float]:
    """The lines of its steps after the warm-up, and the seconds to the first step."""
    started = time.time()
    lines = [line for line in run_training(config) if "loss" in line]
    elapsed = time.time() - started
    spent = sum(config.batch_size / line["images_per_second"] for line in lines)
    return lines[_WARM_UP:], elapsed - spent


def _held_views(config: TrainConfig, rank: int) -> list[Views]:
    index = build_index(config.data.train, config.data)
    plan = make_plan(config, index)
    lanes = lanes_of(rank, _WORKERS, config.lanes)
    tables = read_windows(index, config.data, plan.windows(lanes, 0, _HELD))
    return list(
        training_views(
            tables, plan, lanes, config.data.views, Device(_THREADS), start_step=0, stop_step=_HELD
        )
    )


def _plain_rank(rank: int, config: TrainConfig, folder: str) -> None:
    torch.set_num_threads(_THREADS)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=_WORKERS)
    gather = ProcessGroupGather()
    torch.manual_seed(config.seed)
    objective = build_objective(config, build_index(config.data.train, config.data), gather)
    objective.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    synchronize_batch_norm(objective, gather)
    optimizer = build_optimizer(objective, config.optimizer)
    set_learning_rate(optimizer, 0.01)
    backward = whole_batch(DistributedDataParallel(objective), dtype=torch.float32)
    views = _held_views(config, rank)
    seconds = []
    for step in range(config.steps or 0):
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        backward(views[step % _HELD])
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        Path(folder, "seconds").write_text("\n".join(map(str, seconds[_WARM_UP:])))
    dist.destroy_process_group()


def _plain(config: TrainConfig) -> list[float]:
    """Seconds of its steps after the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_plain_rank, (config, folder), nprocs=_WORKERS)  # pyright: ignore[reportPrivateImportUsage]
        return [float(line) for line in Path(folder, "seconds").read_text().splitlines()]


def _share(lines: list[dict[str, Any]], key: str) -> float:
    return sum(line[key] for line in lines) / sum(
        seconds for line in lines for name, seconds in line.items() if name.endswith("_seconds")
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cifar10", help="a folder of Parquet files train-*")
    parser.add_argument("--encoder", default="resnet20")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    add_json_option(parser)
    arguments = parser.parse_args()
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as output, cluster(2 * _WORKERS):
        for number in range(arguments.rounds):
            config = _config(arguments, output, f"round{number}")
            lines, start = _diptych(config)
            step = statistics.median(config.batch_size / line["images_per_second"] for line in lines)
            plain = statistics.median(_plain(config))
            ours.append(1e3 * step)
            theirs.append(1e3 * plain)
            stages = [name for name in lines[0] if name.endswith("_seconds")]
            print(f"diptych {ours[-1]:.0f} ms a step, plain {theirs[-1]:.0f} ms: {step / plain:.3f}")
            print("  " + ", ".join(f"{name[:-8]} {_share(lines, name):.1%}" for name in stages))
            print(f"  {start:.1f} s to the first step, the report at the end included", flush=True)
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    print(f"ratio: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    peer = "plain DistributedDataParallel, views in memory"
    write_json(arguments.json, [Comparison("a step on two workers, data included", peer, "ms", ours, theirs)])


if __name__ == "__main__":
    main()
