"""Checks of the workers together: the gradient of the loss, and the speed between them."""

from collections.abc import Iterator
from dataclasses import replace
from threading import Event
from typing import Any

import pyarrow as pa
import ray
import torch

from cluster.doctor.check_results import CheckResult
from pipelines.config import DataConfig
from pipelines.index import Index
from pipelines.storage.scratch import scratch_folder
from training.config import TrainConfig
from training.errors import RunError
from training.evaluation.evaluator import Sets
from training.gather import Gather
from training.metrics import Progress
from training.process import Worker
from training.ray_train.launch import launch_group
from training.ray_train.nodes import fitting_workers, usable_resources, wait_for_nodes
from training.selftest import all_gather_rate, gradient_error

_TIMEOUT_SECONDS = 120.0

# Rounding in float64 is a thousandth of this.
_GRADIENT_ERROR = 1e-9

_NO_SETS = Sets(Index("", "folder", pa.table({})))


def check_workers(workers: int | None, gpus_per_worker: float | None) -> Iterator[CheckResult]:
    """Start workers as training would, and check their collectives; unset `workers`: as many as fit."""
    values: dict[str, Any] = {}
    with scratch_folder() as scratch:
        count = workers or _as_many_as_fit()
        config = replace(_config(count, gpus_per_worker), output=scratch)
        try:
            fitting_workers(config)
        except ValueError as error:
            yield CheckResult("workers", "cluster", str(error), "error")
            return
        try:
            launch_group(config, _NO_SETS, values.update, _work, workers=count, stopping=lambda: False)
        except (RunError, ValueError) as error:
            yield CheckResult(
                "workers", f"{count} workers", str(error).splitlines()[0], "error",
                "let the nodes reach each other on all ports, or try fewer with --workers",
            )  # fmt: skip
            return
    where = f"{count} on {values['nodes']} node(s), {values['backend']}" if count > 1 else "one worker"
    error = values["gradient_error"]
    right = error <= _GRADIENT_ERROR
    yield CheckResult(
        "gradient self-test", where, f"differs from one process's by {error:.1e} of its largest",
        "ok" if right else "error", "" if right else "do not train: update NCCL or torch, then check again",
    )  # fmt: skip
    if values["backend"] != "nccl" and count > 1 and usable_resources().get("GPU", 0.0):
        way_out = "the cluster has GPUs: --gpus-per-worker 1, and as many --workers as GPUs"
        yield CheckResult("GPUs", where, "the workers had none", "warning", way_out)
    if count > 1:
        yield CheckResult("all-gather", where, f"{values['rate'] / 1e9:.2f} GB/s into each worker")


def request_nodes(workers: int | None, gpus_per_worker: float | None, seconds: float) -> None:
    """Request nodes for so many workers, or for one, from the autoscaler, and wait for them."""
    config = replace(_config(workers or 1, gpus_per_worker), wait_for_nodes=seconds)

    def fitting() -> int:
        has = usable_resources()
        by_cpus = has.get("CPU", 0.0) // config.cpus_per_worker
        return int(min(by_cpus, has.get("GPU", 0.0) // gpus_per_worker) if gpus_per_worker else by_cpus)

    wait_for_nodes(config, fitting, workers or 1, Event())


def _config(workers: int, gpus_per_worker: float | None) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(train=""), name="doctor", timeout=_TIMEOUT_SECONDS,
        workers=workers, lanes=workers, batch_size=2 * workers, gpus_per_worker=gpus_per_worker,
    )  # fmt: skip


def _as_many_as_fit() -> int:
    """A worker for each GPU; without GPUs, as many as the CPUs have room for."""
    resources = usable_resources()
    return int(resources.get("GPU", 0) or max(1, resources.get("CPU", 0) // _config(1, None).cpus_per_worker))


def _work(config: TrainConfig, sets: Sets, worker: Worker, progress: Progress) -> None:
    """Run in each worker; rank 0 reports."""
    gather, device = worker.gather, worker.device
    values = {
        "gradient_error": gradient_error(gather, device),
        "rate": all_gather_rate(gather, device),
        "nodes": _node_count(gather, device),
        "backend": torch.distributed.get_backend() if gather.world_size > 1 else "",
    }
    if gather.rank == 0:
        progress(values)


def _node_count(gather: Gather, device: torch.device) -> int:
    number = int(ray.get_runtime_context().get_node_id()[:15], 16)
    return len(gather.rows(torch.tensor([number], device=device)).unique())
