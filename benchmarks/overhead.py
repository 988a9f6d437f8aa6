"""A step of `diptych train`, data included, against plain DistributedDataParallel with its views in memory.

    python benchmarks/overhead.py CIFAR10    # a folder of Parquet files train-*: image, label
    python benchmarks/overhead.py PHOTOGRAPHS --train '*' --device cuda --recipe simclr \\
        --encoder resnet50 --batch-size 256

On CPUs two workers on this machine, each with half of its cores; with CUDA one on its GPU, in bfloat16. The
same networks, loss, optimiser and batch, in turns. diptych's steps read, decode and augment their images, and
are timed by its own metrics.jsonl from the tenth step on. Prints the ratio of the medians of both for each
round, the shares of a step's time, and the seconds from the command to the first step. --compile compiles the
encoder for both.
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

from benchmarks.comparison import Comparison, add_json_option, spread, write_json
from benchmarks.machine import CORES, add_device_option, chosen_device, describe, finish
from cluster.ray_cluster import cluster
from cluster.train import run_training
from pipelines.config import DataConfig
from pipelines.feed import Device, training_views
from pipelines.index import build_index
from pipelines.plan import lanes_of
from pipelines.reader import read_windows
from pipelines.views import Views
from training.config import TrainConfig
from training.gather import ProcessGroupGather
from training.gradients import whole_batch
from training.models.batch_norm import synchronize_batch_norm
from training.objective_builder import build_objective
from training.optimizers import build_optimizer, set_learning_rate
from training.trainer import make_plan

_WORKERS = {"cpu": 2, "cuda": 1}
_WARM_UP = 10

# Batches that are held in memory and used again and again.
_HELD = 4


def _config(arguments: argparse.Namespace, output: str, name: str) -> TrainConfig:
    data = DataConfig(train=f"{arguments.folder}/{arguments.train}", recipe=arguments.recipe)
    settings: dict[str, Any] = {
        "encoder": {"name": arguments.encoder, "stem": arguments.stem},
        "projector": {"hidden_dim": 256, "dim": 64},
        "optimizer": {"name": "sgd", "learning_rate": 0.03},
        "evaluation": {"diagnostic_images": 0},
    }
    return TrainConfig(
        data=data, output=output, name=name, workers=_WORKERS[arguments.device],
        batch_size=arguments.batch_size, steps=arguments.steps, compile=arguments.compile, **settings,
    )  # fmt: skip


def _diptych(config: TrainConfig) -> tuple[list[dict[str, Any]], float]:
    """The lines of its steps after the warm-up, and the seconds to the first step."""
    started = time.time()
    lines = [line for line in run_training(config) if "loss" in line]
    elapsed = time.time() - started
    spent = sum(config.batch_size / line["images_per_second"] for line in lines)
    return lines[_WARM_UP:], elapsed - spent


def _held_views(config: TrainConfig, rank: int, workers: int, device: Device) -> list[Views]:
    index = build_index(config.data.train, config.data)
    plan = make_plan(config, index)
    lanes = lanes_of(rank, workers, config.lanes)
    tables = read_windows(index, config.data, plan.windows(lanes, 0, _HELD))
    views = training_views(tables, plan, lanes, config.data.views, device, start_step=0, stop_step=_HELD)
    return list(views)


def _plain_rank(rank: int, config: TrainConfig, device: torch.device, folder: str) -> None:
    workers = _WORKERS[device.type]
    threads = max(1, CORES // workers)
    torch.set_num_threads(threads)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{folder}/store", rank=rank, world_size=workers)
    gather = ProcessGroupGather()
    torch.manual_seed(config.seed)
    objective = build_objective(config, build_index(config.data.train, config.data), gather).to(device)
    objective.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    synchronize_batch_norm(objective, gather)
    optimizer = build_optimizer(objective, config.optimizer)
    set_learning_rate(optimizer, 0.01)
    if config.compile:
        objective.encoder.compile()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    backward = whole_batch(DistributedDataParallel(objective), dtype=dtype)
    views = _held_views(config, rank, workers, Device(threads, device.index))
    seconds = []
    for step in range(config.steps or 0):
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        backward(views[step % _HELD])
        optimizer.step()
        finish(device)
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        Path(folder, "seconds").write_text("\n".join(map(str, seconds[_WARM_UP:])))
    dist.destroy_process_group()


def _plain(config: TrainConfig, device: torch.device) -> list[float]:
    """Seconds of its steps after the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_plain_rank, (config, device, folder), nprocs=_WORKERS[device.type])  # pyright: ignore[reportPrivateImportUsage]
        return [float(line) for line in Path(folder, "seconds").read_text().splitlines()]


def _share(lines: list[dict[str, Any]], key: str) -> float:
    return sum(line[key] for line in lines) / sum(
        seconds for line in lines for name, seconds in line.items() if name.endswith("_seconds")
    )


def _round(config: TrainConfig, device: torch.device) -> tuple[float, float]:
    """Median milliseconds of a step of diptych and of a plain one."""
    lines, start = _diptych(config)
    step = 1e3 * statistics.median(config.batch_size / line["images_per_second"] for line in lines)
    plain = 1e3 * statistics.median(_plain(config, device))
    stages = [name for name in lines[0] if name.endswith("_seconds")]
    print(f"diptych {step:.0f} ms a step, plain {plain:.0f} ms: {step / plain:.3f}")
    print("  " + ", ".join(f"{name[:-8]} {_share(lines, name):.1%}" for name in stages))
    print(f"  {start:.1f} s to the first step, the report at the end included", flush=True)
    return step, plain


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="Parquet files with the columns image and label")
    parser.add_argument("--train", default="train-*", help="pattern of the files")
    parser.add_argument("--recipe", default="simclr-cifar")
    parser.add_argument("--encoder", default="resnet20")
    parser.add_argument("--stem", choices=["imagenet", "cifar"], help="encoder.stem of ImageNet ResNets")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="the encoder, for both")
    add_device_option(parser)
    add_json_option(parser)
    arguments = parser.parse_args()
    if arguments.steps <= _WARM_UP:
        parser.error(f"--steps {arguments.steps} leaves none after the first {_WARM_UP}; give more")
    device = chosen_device(arguments.device)
    print(describe(device, "torch", "ray", "nvidia-dali-cuda130"))
    with tempfile.TemporaryDirectory() as output, cluster(2 * _WORKERS[device.type]):
        rounds = [
            _round(_config(arguments, output, f"round{number}"), device) for number in range(arguments.rounds)
        ]
    ours, theirs = (list(values) for values in zip(*rounds, strict=True))
    ratios = [mine / other for mine, other in rounds]
    print(f"diptych / plain: {spread(ratios, '.3f')}")
    peer = "plain DistributedDataParallel, views in memory"
    write_json(arguments.json, [Comparison("a step, data included", peer, "ms", ours, theirs)])


if __name__ == "__main__":
    main()
