"""A queue of runs that want to start workers on a shared cluster: first come, first served."""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from secrets import token_hex
from types import TracebackType
from typing import Any

import ray
from ray import PlacementGroupID
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from training.config import TrainConfig, worker_counts
from training.errors import StoppedError
from training.metrics import Progress
from training.ray_train.nodes import fitting_workers, free_resources, holds, usable_resources, worker_bundle

# A place in the queue is a placement group: all drivers see its name, and Ray removes it with its driver. It
# requests one byte, since Ray needs a request for something.
_NAME, _BYTE = "diptych waits since", {"memory": 1.0}

# Seconds between checks for a run's turn, and between messages on why it waits.
_LOOK_SECONDS, _SAY_SECONDS = 1, 300.0


class Place:
    """A run's place in the queue, until the block ends or its workers have started."""

    def __init__(self, since: float) -> None:
        """`since`: when the run first queued, in seconds since 1970; a restarted run keeps its place."""
        self._name = f"{_NAME} {since:018.6f} {token_hex(4)}"
        self._group: Any = None

    def __enter__(self) -> "Place":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(RayError):  # The place is lost with the cluster.
            self.leave()

    def leave(self) -> None:
        """Leave the queue, so that the next run has its turn."""
        if self._group is not None:
            remove_placement_group(self._group)
        self._group = None

    def wait(
        self, config: TrainConfig, most: int, tell: Progress, stopping: Callable[[], bool]
    ) -> tuple[int, dict[str, float]]:
        """Wait for this run's turn, and return the number of workers that fit and each one's resources.

        The number is the largest that the config allows and that has free room, up to `most` or to the new
        limit if nodes come or go. It waits only for room for the fewest workers, since a run grows later.
        Calls tell({"waiting": ...}) now and then. Raises StoppedError once `stopping()` is true, and
        NoRoomError if the cluster becomes too small.
        """
        if self._group is None:
            self._group = placement_group([_BYTE], name=self._name)
        fitting, wanted = fitting_workers(config), _RoomRequest(config, most)
        notice = _WaitNotice(tell)
        try:
            while not stopping():
                if (now := fitting_workers(config)) != fitting:
                    wanted.end()
                    fitting, wanted = now, _RoomRequest(config, now)
                before = self._runs_before()
                if count := wanted.found(first=not before):
                    return count, wanted.each
                notice.update(config, wanted.counts[0], before)
        finally:
            wanted.end()
        raise StoppedError(0)

    def _runs_before(self) -> int:
        """Number of runs ahead in the queue."""
        return sum(name < self._name for name in _waiting())


class _RoomRequest:
    """Requests room for a run's workers: the fewest, or more if free. `each`: one worker's resources."""

    def __init__(self, config: TrainConfig, most: int) -> None:
        self.each = worker_bundle(config, most)
        self.counts = [count for count in worker_counts(config) if count <= most]
        self._group: Any = None

    def found(self, *, first: bool) -> int:
        """Number of workers that have room after a second; 0 unless the run is `first` in the queue."""
        if first and self._group is None:
            # The autoscaler sees this request too.
            self._group = placement_group([self.each] * self.counts[0])
        if self._group is None:
            time.sleep(_LOOK_SECONDS)
        elif self._group.wait(_LOOK_SECONDS):
            additional = [count - self.counts[0] for count in self.counts]
            fits = (more for more in additional if holds(free_resources(), self.each, more))
            return self.counts[0] + max(fits)
        return 0

    def end(self) -> None:
        """Release the room, for the workers or for others."""
        if self._group is not None:
            with suppress(RayError):
                remove_placement_group(self._group)
        self._group = None


def others_wait() -> bool:
    """Whether any run waits for its turn."""
    return bool(_waiting())


def groups_of(bundle: dict[str, float], count: int) -> set[str]:
    """IDs of the placement groups of this process's job that have `count` such bundles."""
    job = ray.get_runtime_context().get_job_id()
    return {
        identity
        for identity, group in placement_group_table().items()
        if identity.endswith(job) and _is_there(group) and list(group["bundles"].values()) == [bundle] * count
    }


def remove_groups(identities: Iterable[str]) -> None:
    """Remove placement groups by ID, and end the processes that run in them."""
    for identity in identities:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(identity))))


class _WaitNotice:
    """Reports why a run waits: when the queue changes, and again after a while."""

    def __init__(self, tell: Progress) -> None:
        self._tell, self._before, self._at = tell, -1, -math.inf

    def update(self, config: TrainConfig, workers: int, before: int) -> None:
        now = time.monotonic()
        if before != self._before or now - self._at > _SAY_SECONDS:
            self._tell({"waiting": _reason(config, workers, before)})
            self._before, self._at = before, now


def _reason(config: TrainConfig, workers: int, before: int) -> str:
    """The resources that a run of so many workers waits for, and who uses them."""
    kind = "GPU" if worker_bundle(config, workers).get("GPU") else "CPU"
    each = config.cpus_per_worker if kind == "CPU" else worker_bundle(config, workers)["GPU"]
    total = usable_resources().get(kind, 0.0)
    used = total - sum(node.get(kind, 0.0) for node in free_resources())
    # Do not count the tenth of a CPU that a trial of Ray Tune has beside its workers.
    groups = sum(
        any(bundle.get(kind, 0.0) > 0.1 for bundle in group["bundles"].values())
        for group in placement_group_table().values()
        if group["state"] == "CREATED"
    )
    holders = f" by {groups} other run{'s' if groups > 1 else ''}" if groups else ""
    line = f"; {before} other{'s wait' if before > 1 else ' waits'} before it" if before else ""
    used = round(used, 1)
    return f"{workers * each:g} {kind}s; {used:g} of the cluster's {total:g} are in use{holders}{line}"


def _waiting() -> list[str]:
    groups = placement_group_table().values()
    return [group["name"] for group in groups if group["name"].startswith(_NAME) and _is_there(group)]


def _is_there(group: dict[str, Any]) -> bool:
    return group["state"] != "REMOVED"
