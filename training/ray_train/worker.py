"""In a worker process of Ray Train: do a task, and report to the driver, the log and Ray's dashboard."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.train
import torch
from ray.exceptions import ObjectStoreFullError, OutOfDiskError
from ray.train.torch import get_device
from ray.util.metrics import Gauge

from pipelines.stream import stream_windows
from training.config import TrainConfig
from training.evaluation.evaluator import Sets
from training.evaluation.sets import ImageCache
from training.gather import LocalGather, ProcessGroupGather
from training.metrics import LOG, Progress
from training.process import Worker
from training.ray_train.channel import WorkerEnd

Task = Callable[[TrainConfig, Sets, Worker, Progress], None]


@dataclass(frozen=True, eq=False)
class Job:
    """A task for each worker of a group."""

    config: TrainConfig
    sets: Sets
    task: Task
    channel: WorkerEnd


def work(loop_config: dict[str, Any]) -> None:
    """The function that each worker process runs."""
    job: Job = loop_config["job"]
    context = ray.train.get_context()
    leads = context.get_world_rank() == 0
    if leads:
        job.channel.put({"phase": "workers"})
    job.channel.join()
    stopping = job.channel.watch()
    alone = context.get_world_size() == 1
    threads = max(1, (os.cpu_count() or 1) // context.get_local_world_size())
    torch.set_num_threads(threads)
    worker = Worker(
        gather=LocalGather() if alone else ProcessGroupGather(),
        device=get_device(),
        threads=threads,
        tables=stream_windows,
        stopping=stopping if leads else lambda: False,
        # No limit: Ray's object store spills to disk.
        cache=ImageCache(_put, ray.get, most_bytes=None),
    )
    job.task(job.config, job.sets, worker, job.channel.put)


def _put(table: pa.Table) -> ray.ObjectRef | None:
    """Put the table into Ray's object store; None where neither that nor the disk has room."""
    try:
        return ray.put(table)
    except (ObjectStoreFullError, OutOfDiskError):
        return None


def watched(config: TrainConfig, sets: Sets, worker: Worker, progress: Progress, *, task: Task) -> None:
    """Do the task, send its progress to Ray's metrics too, and log with the run's name and rank."""
    _log_as(config.name, worker.gather.rank)
    metrics = DashboardMetrics(config.name)

    def show(event: dict[str, Any]) -> None:
        metrics.update(event)
        progress(event)

    task(config, sets, worker, show)


def _log_as(run: str, rank: int) -> None:
    """Prefix each line of diptych's log with the run and rank."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {run} rank {rank} %(levelname)s: %(message)s"))
    LOG.handlers, LOG.propagate = [handler], False
    LOG.setLevel(logging.INFO)


_METRICS = {
    "step": "Steps done",
    "epoch": "Number of the epoch, from 1",
    "loss": "Loss of the last step shown",
    "learning_rate": "Learning rate of the last step shown",
    "images_per_second": "Images a second, over all workers",
    "data_wait_seconds": "Seconds of the last step shown that rank 0 waited for data",
    "view_matching": "Share of the last step's views whose nearest other view in the batch is their partner",
    "knn_top1": "kNN accuracy, from 0 to 1",
    "effective_rank": "Effective rank of the features",
    "skipped": "Steps skipped so far, whose loss or gradient was not finite",
    "quarantined": "Images quarantined so far",
}


class DashboardMetrics:
    """Ray metrics named diptych_..., tagged with the run's name."""

    def __init__(self, run: str) -> None:
        self._gauges = {
            name: Gauge(f"diptych_{name}", description, tag_keys=("run",))
            for name, description in _METRICS.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})

    def update(self, values: dict[str, Any]) -> None:
        """Set the metrics that `values` contains."""
        for name, gauge in self._gauges.items():
            if name in values:
                gauge.set(values[name])
