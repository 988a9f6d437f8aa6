"""How many workers the connected Ray cluster has room for, and asking it for more room."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event
from typing import Any

from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from pipelines.stream import READER_CPUS, READERS
from training.config import TrainConfig, most_workers, worker_counts
from training.faults import NoRoomError
from training.nodes import free_resources, usable_resources

_LOOK_SECONDS, _STEADY_SECONDS = 2.0, 60.0


def fitting_workers(config: TrainConfig) -> int:
    """The largest number of workers that the config allows and the connected cluster has room for.

    Where the config leaves it open that is a worker for each GPU, or one. Raises NoRoomError, with a number
    that fits, where the cluster is too small.
    """
    resources = usable_resources()
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    each, share = config.cpus_per_worker, config.gpus_per_worker
    allowed = worker_counts(config)
    if config.workers is None:
        allowed = [count for count in allowed if count <= max(1, gpus // (share or 1.0))]
    if share and allowed[0] * share > gpus:
        raise NoRoomError(
            f"workers={allowed[0]} need {allowed[0] * share:g} GPUs of the cluster, which has {gpus:g}; "
            "leave out gpus_per_worker"
        )
    fitting = [count for count in allowed if count * each <= cpus and count * (share or 0.0) <= gpus]
    if not fitting:
        fewer = [count for count in range(1, int(cpus / each) + 1) if config.lanes % count == 0]
        way_out = f"--workers {fewer[-1]}" if fewer else "--wait-for-nodes 1800, if it grows"
        raise NoRoomError(
            f"workers={allowed[0]} need {allowed[0] * each:g} CPUs of the cluster, which has {cpus:g}; "
            f"try {way_out}"
        )
    return fitting[-1]


def gpus_per_worker(config: TrainConfig, workers: int) -> float:
    """What each of so many workers gets: none where the cluster has too few for all."""
    share = 1.0 if config.gpus_per_worker is None else config.gpus_per_worker
    return share if usable_resources().get("GPU", 0.0) >= workers * share else 0.0


def worker_bundle(config: TrainConfig, workers: int) -> dict[str, float]:
    """What Ray sets aside for each of so many workers; its readers' share of its cores is left to them."""
    bundle = {"CPU": max(0.0, config.cpus_per_worker - READERS * READER_CPUS)}
    return bundle | ({"GPU": gpus} if (gpus := gpus_per_worker(config, workers)) else {})


def holds(nodes: Sequence[dict[str, float]], bundle: dict[str, float], count: int) -> bool:
    """Whether nodes that have these resources to spare hold so many bundles."""
    wanted = {kind: amount for kind, amount in bundle.items() if amount}
    each = (
        min((int(node.get(kind, 0.0) / amount + 1e-6) for kind, amount in wanted.items()), default=count)
        for node in nodes
    )
    return sum(each) >= count


def can_grow(config: TrainConfig, workers: int) -> bool:
    """Whether there is room for more workers, of a number that the config allows, beside those `workers`."""
    most = or_none(lambda: fitting_workers(config))
    more = next((count for count in worker_counts(config) if count > workers), math.inf)
    return most >= more and holds(free_resources(), worker_bundle(config, most), int(more) - workers)


def or_none(fitting: Callable[[], int]) -> int:
    """What fitting() gives, and 0 where it raises ValueError since the cluster is too small."""
    try:
        return fitting()
    except ValueError:
        return 0


@contextmanager
def asked_for(config: TrainConfig, workers: int) -> Iterator[Callable[[], bool]]:
    """Have a cluster that grows by itself bring nodes with room for so many workers, until the block ends.

    Nodes that have come stay for as long as the cluster keeps idle ones. Yields whether all have come.
    """
    each = {"CPU": config.cpus_per_worker}
    if gpus := config.gpus_per_worker:
        each["GPU"] = gpus
    asked = placement_group([each] * workers, strategy="PACK")
    try:
        yield lambda: _is_created(asked)
    finally:
        remove_placement_group(asked)


def _is_created(group: Any) -> bool:
    return placement_group_table(group)["state"] == "CREATED"


def wait_for_nodes(
    config: TrainConfig, fitting: Callable[[], int], most: int, stop: Event, *, groups: int = 1
) -> None:
    """Have nodes come for `groups` times the workers that the config allows, and wait for them.

    Returns once fitting() is `most`, config.wait_for_nodes seconds are over, `stop` is set, or a minute has
    brought no more where something fits. Where fitting() raises ValueError nothing does.
    """
    began = steady_since = time.monotonic()
    fits = or_none(fitting)
    with asked_for(config, most_workers(config) * groups):
        while fits < most and time.monotonic() - began < config.wait_for_nodes and not stop.is_set():
            if fits and time.monotonic() - steady_since > _STEADY_SECONDS:
                return
            time.sleep(_LOOK_SECONDS)
            if (now := or_none(fitting)) != fits:
                fits, steady_since = now, time.monotonic()
