"""Ray Train adapter: a training run on the workers of a Ray cluster."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any

import ray
import ray.train
import torch
from ray.train import RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.queue import Queue

from pipelines import storage
from pipelines.plan import check_lanes
from pipelines.stream import READER_CPUS, READERS, stream_windows
from training.config import TrainConfig
from training.evaluator import Sets
from training.gather import LocalGather, ProcessGroupGather
from training.process import Worker
from training.run import Progress, run_uri, train

# Cores that the scheduler sets aside for a worker and for the tasks that read its images.
CPUS_PER_WORKER = 1 + READER_CPUS * READERS


class RunError(Exception):
    """A worker failed; the message says which and why."""


Task = Callable[[TrainConfig, Sets, Worker, Progress], None]


@dataclass(frozen=True, eq=False)
class _Job:
    config: TrainConfig
    sets: Sets
    task: Task
    events: Queue


def launch(config: TrainConfig, sets: Sets, progress: Progress, task: Task = train) -> None:
    """Run `task` for `config` on all workers of the connected Ray cluster; progress(values) hears of it.

    Raises ValueError if the cluster cannot hold the workers, RunError if one of them fails.
    """
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    workers = choose_workers(config, gpus)
    _check_room(workers, resources)
    with _events(progress) as events, tempfile.TemporaryDirectory(prefix="diptych-") as scratch:
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": _Job(config, sets, task, events)},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus >= workers),
            torch_config=TorchConfig(backend="nccl" if gpus >= workers else "gloo"),
            # diptych keeps its own checkpoints; Ray has nothing to keep.
            run_config=RunConfig(name=config.name, storage_path=scratch),
        )
        try:
            trainer.fit()
        except WorkerGroupError as error:
            rank, cause = min(error.worker_failures.items())
            log = storage.join(run_uri(config), "error.log")
            storage.write(log, str(error).encode())
            raise RunError(f"worker {rank} failed: {_root(cause)} (traceback: {log})") from error


def choose_workers(config: TrainConfig, gpus: int) -> int:
    """The config's workers, or as many as there are GPUs for and lanes allow."""
    workers = config.workers or max(
        count for count in range(1, config.lanes + 1) if config.lanes % count == 0 and count <= max(1, gpus)
    )
    check_lanes(config.batch_size, config.lanes, workers)
    return workers


def _check_room(workers: int, resources: Mapping[str, float]) -> None:
    cpus = resources.get("CPU", 0)
    if workers * CPUS_PER_WORKER > cpus:
        raise ValueError(
            f"workers={workers} need {workers * CPUS_PER_WORKER:g} CPUs of the cluster, which has {cpus:g}; "
            f"try --workers {max(1, int(cpus / CPUS_PER_WORKER))}"
        )


def _work(loop_config: dict[str, Any]) -> None:
    """What each worker process runs."""
    job: _Job = loop_config["job"]
    context = ray.train.get_context()
    alone = context.get_world_size() == 1
    threads = max(1, (os.cpu_count() or 1) // context.get_local_world_size())
    torch.set_num_threads(threads)
    worker = Worker(
        gather=LocalGather() if alone else ProcessGroupGather(),
        device=get_device(),
        threads=threads,
        tables=stream_windows,
    )
    job.task(job.config, job.sets, worker, job.events.put)


@contextmanager
def _events(progress: Progress) -> Iterator[Queue]:
    """A queue whose events reach `progress` in this process until the block ends."""
    queue = Queue(actor_options={"num_cpus": 0})

    def pump() -> None:
        while (event := queue.get()) is not None:
            progress(event)

    thread = Thread(target=pump, daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        queue.put(None)
        thread.join()
        queue.shutdown()


def _root(error: BaseException) -> str:
    """The innermost cause's class and message."""
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    return f"{type(error).__name__}: {error}"
