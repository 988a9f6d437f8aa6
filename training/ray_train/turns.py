"""Whose turn it is to start workers, on a cluster that several runs share: first come, first served."""

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

# A place in the line is a placement group: all drivers see its name, and Ray removes it with its driver. It
# asks for one byte, since Ray wants it to ask for something.
_NAME, _BYTE = "diptych waits since", {"memory": 1.0}

# How often a run looks whether it is its turn, and says again why it is not.
_LOOK_SECONDS, _SAY_SECONDS = 1, 300.0


class Place:
    """A run's place in the line, until the block ends or its workers have come."""

    def __init__(self, since: float) -> None:
        """`since` is when it came, in seconds since 1970: a run that has lost its workers keeps its place."""
        self._name = f"{_NAME} {since:018.6f} {token_hex(4)}"
        self._group: Any = None

    def __enter__(self) -> "Place":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(RayError):  # Where the cluster is gone, so is the place.
            self.leave()

    def leave(self) -> None:
        """Let the next one have its turn."""
        if self._group is not None:
            remove_placement_group(self._group)
        self._group = None

    def wait(
        self, config: TrainConfig, most: int, tell: Progress, stopping: Callable[[], bool]
    ) -> tuple[int, dict[str, float]]:
        """How many workers there is room for, once it is this run's turn, and what each may have.

        That is the largest number that the config allows, `most` at most, or what fits once nodes have come
        or gone meanwhile: it waits for room for the fewest alone, since a run takes more once there is room
        for them. Calls tell(waiting=...) now and then. Raises StoppedError once `stopping()` is true,
        NoRoomError once the cluster has become too small.
        """
        if self._group is None:
            self._group = placement_group([_BYTE], name=self._name)
        fitting, wanted = fitting_workers(config), _Wanted(config, most)
        said = _Said(tell)
        try:
            while not stopping():
                if (now := fitting_workers(config)) != fitting:
                    wanted.end()
                    fitting, wanted = now, _Wanted(config, now)
                before = self._before()
                if count := wanted.found(first=not before):
                    return count, wanted.each
                said.why(config, wanted.counts[0], before)
        finally:
            wanted.end()
        raise StoppedError(0)

    def _before(self) -> int:
        """How many others came before it."""
        return sum(name < self._name for name in _waiting())


class _Wanted:
    """Room for workers of a run: for the fewest, or for more where that is free; `each` is what one has."""

    def __init__(self, config: TrainConfig, most: int) -> None:
        self.each = worker_bundle(config, most)
        self.counts = [count for count in worker_counts(config) if count <= most]
        self._asked: Any = None

    def found(self, *, first: bool) -> int:
        """How many workers have room after a moment; 0 unless the run is the `first` in the line."""
        if first and self._asked is None:
            # Also tells a cluster that grows by itself what is wanted.
            self._asked = placement_group([self.each] * self.counts[0])
        if self._asked is None:
            time.sleep(_LOOK_SECONDS)
        elif self._asked.wait(_LOOK_SECONDS):
            beside = [count - self.counts[0] for count in self.counts]
            return self.counts[0] + max(more for more in beside if holds(free_resources(), self.each, more))
        return 0

    def end(self) -> None:
        """Leave the room to the workers, or to others."""
        if self._asked is not None:
            with suppress(RayError):
                remove_placement_group(self._asked)
        self._asked = None


def others_wait() -> bool:
    """Whether any run waits for its turn."""
    return bool(_waiting())


def groups_of(bundle: dict[str, float], count: int) -> set[str]:
    """The placement groups of this process's job that have so many bundles of this kind."""
    job = ray.get_runtime_context().get_job_id()
    return {
        identity
        for identity, group in placement_group_table().items()
        if identity.endswith(job) and _is_there(group) and list(group["bundles"].values()) == [bundle] * count
    }


def remove_groups(identities: Iterable[str]) -> None:
    """Remove placement groups that something else has made, and end what runs in them."""
    for identity in identities:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(identity))))


class _Said:
    """Says why a run waits: when that changes, and again after a while."""

    def __init__(self, tell: Progress) -> None:
        self._tell, self._before, self._at = tell, -1, -math.inf

    def why(self, config: TrainConfig, workers: int, before: int) -> None:
        now = time.monotonic()
        if before != self._before or now - self._at > _SAY_SECONDS:
            self._tell({"waiting": _why(config, workers, before)})
            self._before, self._at = before, now


def _why(config: TrainConfig, workers: int, before: int) -> str:
    """What a run of so many workers waits for, and who has it."""
    kind = "GPU" if worker_bundle(config, workers).get("GPU") else "CPU"
    each = config.cpus_per_worker if kind == "CPU" else worker_bundle(config, workers)["GPU"]
    total = usable_resources().get(kind, 0.0)
    used = total - sum(node.get(kind, 0.0) for node in free_resources())
    # Tune's trials have a tenth of a CPU beside their workers.
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
