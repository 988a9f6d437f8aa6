"""Nodes of the connected Ray cluster: the workers that fit on them, and requests to the autoscaler."""

import math
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from pipelines.stream import READER_CPUS, READERS
from training.config import TrainConfig, fitting_counts, most_workers, worker_counts
from training.errors import NoRoomError

# Imports nothing that takes seconds, since the process of channel.py's actor imports this module.

_ANSWER_SECONDS, _LOOK_SECONDS = 2.0, 1.0

# How long a head may not answer: one on this machine, and one elsewhere. Once a driver touches objects of its
# lost raylet, Ray ends the process without a message: on this machine a second is too long.
_LOCAL_SECONDS, _REMOTE_SECONDS = 0.1, 40.0


def draining_nodes() -> set[str]:
    """IDs of the nodes that are being drained, such as preempted ones."""
    draining = _private_state("get_draining_nodes")
    return set() if draining is None else set(draining)


def usable_resources() -> dict[str, float]:
    """Total resources of the cluster's nodes, without those that are being drained."""
    leaving, total = draining_nodes(), dict[str, float]()
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in leaving:
            for name, amount in node["Resources"].items():
                total[name] = total.get(name, 0.0) + amount
    return total


def free_resources() -> list[dict[str, float]]:
    """Free resources of each of the cluster's nodes, without those that are being drained."""
    leaving, nodes = draining_nodes(), _private_state("available_resources_per_node")
    if nodes is None:
        return [dict(ray.available_resources())]
    return [has for node, has in nodes.items() if node not in leaving]


def _private_state(method: str) -> Any:
    """Result of a method of Ray's private state; None if Ray no longer has it.

    Without it, draining nodes count until they are lost, and the cluster counts as one node: where no node
    has enough free resources, workers wait until their start times out, and are started again.
    """
    try:
        from ray._private.state import state

        return getattr(state, method)()
    except (ImportError, AttributeError):
        return None


def wait_for_lost_nodes(seconds: float, stop: Event) -> None:
    """Wait until Ray has noticed all lost nodes, for at most `seconds` or until `stop` is set.

    Ray counts a lost node as alive until several of its health checks in a row have failed.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(map(_answers, ray.nodes())):
        if stop.wait(_LOOK_SECONDS):
            return


class Head:
    """The cluster's head, and the node that this process is connected through.

    answers: whether both answered the last check.
    """

    def __init__(self) -> None:
        context = ray.get_runtime_context()
        self._node = here = context.get_node_id()
        host, _, port = context.gcs_address.rpartition(":")
        self._places = {(host.strip("[]"), int(port))}
        self._places |= {_place(node) for node in ray.nodes() if node["NodeID"] == here}
        # The time of the first check without an answer; this process itself may have been suspended before.
        self._silent_since: float | None = None
        self.answers = True
        # A remote head may be restarting, or the network may be down. Ray's own processes wait for a minute.
        local = all(host.startswith("127.") or host == "::1" for host, _ in self._places)
        self._grace_seconds = _LOCAL_SECONDS if local else _REMOTE_SECONDS

    def lost(self) -> bool:
        """Whether it has not answered for a while; call it several times a second."""
        self.answers = all(map(_listens, self._places))
        if self.answers:
            self._silent_since = None
            return False
        self._silent_since = self._silent_since or time.monotonic()
        return time.monotonic() - self._silent_since > self._grace_seconds

    def given_up(self) -> bool:
        """Whether the head reports this process's node as dead, even if that still listens."""
        return not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == self._node)


def _answers(node: dict[str, Any]) -> bool:
    """Whether the node answers, or Ray knows that it is lost."""
    if not node["Alive"]:
        return True
    return _listens(_place(node))


def _place(node: dict[str, Any]) -> tuple[str, int]:
    return node["NodeManagerAddress"], node["NodeManagerPort"]


def _listens(place: tuple[str, int]) -> bool:
    try:
        socket.create_connection(place, _ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


_ROOM_LOOK_SECONDS, _STEADY_SECONDS = 2.0, 60.0


def fitting_workers(config: TrainConfig) -> int:
    """The largest number of workers that the config allows and the connected cluster has room for.

    If `workers` is unset, that is one per GPU, or one. Raises NoRoomError, with a number that fits, where the
    cluster is too small.
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
        fewer = [count for count in fitting_counts(config) if count * each <= cpus]
        way_out = f"--workers {fewer[-1]}" if fewer else "--wait-for-nodes 1800, if it grows"
        raise NoRoomError(
            f"workers={allowed[0]} need {allowed[0] * each:g} CPUs of the cluster, which has {cpus:g}; "
            f"try {way_out}"
        )
    return fitting[-1]


def gpus_per_worker(config: TrainConfig, workers: int) -> float:
    """GPUs for each of so many workers: none where the cluster has too few for all."""
    share = 1.0 if config.gpus_per_worker is None else config.gpus_per_worker
    return share if usable_resources().get("GPU", 0.0) >= workers * share else 0.0


def worker_bundle(config: TrainConfig, workers: int) -> dict[str, float]:
    """Resources that Ray reserves for each worker, without the cores of its reader tasks."""
    bundle = {"CPU": max(0.0, config.cpus_per_worker - READERS * READER_CPUS)}
    return bundle | ({"GPU": gpus} if (gpus := gpus_per_worker(config, workers)) else {})


def holds(nodes: Sequence[dict[str, float]], bundle: dict[str, float], count: int) -> bool:
    """Whether so many bundles fit on nodes with these free resources."""
    wanted = {kind: amount for kind, amount in bundle.items() if amount}
    each = (
        min((int(node.get(kind, 0.0) / amount + 1e-6) for kind, amount in wanted.items()), default=count)
        for node in nodes
    )
    return sum(each) >= count


def can_grow(config: TrainConfig, workers: int) -> bool:
    """Whether there is room for the next larger number of workers that the config allows."""
    most = or_none(lambda: fitting_workers(config))
    more = next((count for count in worker_counts(config) if count > workers), math.inf)
    return most >= more and holds(free_resources(), worker_bundle(config, most), int(more) - workers)


def or_none(fitting: Callable[[], int]) -> int:
    """The result of fitting(), or 0 where it raises ValueError because the cluster is too small."""
    try:
        return fitting()
    except ValueError:
        return 0


@contextmanager
def requested_nodes(config: TrainConfig, workers: int) -> Iterator[Callable[[], bool]]:
    """Request nodes for so many workers from the autoscaler, until the block ends.

    Yields a function that tells whether all have come. Afterwards the cluster keeps them as it does other
    idle nodes.
    """
    each = {"CPU": config.cpus_per_worker}
    if gpus := config.gpus_per_worker:
        each["GPU"] = gpus
    request = placement_group([each] * workers, strategy="PACK")
    try:
        yield lambda: _is_created(request)
    finally:
        remove_placement_group(request)


def _is_created(group: Any) -> bool:
    return placement_group_table(group)["state"] == "CREATED"


def wait_for_nodes(
    config: TrainConfig, fitting: Callable[[], int], most: int, stop: Event, *, groups: int = 1
) -> None:
    """Request nodes for `groups` times the workers that the config allows, and wait for them.

    Returns once fitting() is `most`, config.wait_for_nodes seconds have passed, `stop` is set, or fitting(),
    if above 0, has not changed for a minute. A ValueError of fitting() counts as 0.
    """
    began = steady_since = time.monotonic()
    fits = or_none(fitting)
    with requested_nodes(config, most_workers(config) * groups):
        while fits < most and time.monotonic() - began < config.wait_for_nodes and not stop.is_set():
            if fits and time.monotonic() - steady_since > _STEADY_SECONDS:
                return
            time.sleep(_ROOM_LOOK_SECONDS)
            if (now := or_none(fitting)) != fits:
                fits, steady_since = now, time.monotonic()
