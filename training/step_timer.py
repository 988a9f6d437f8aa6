"""Times the stages of a step: waiting for data, forward, backward, gathering rows, and the optimiser."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from jaxtyping import Shaped
from torch import Tensor

from training.gather import Gather

Stage = Literal["data_wait", "forward", "backward", "gather", "optimizer"]


class StepTimer:
    """Wall-clock seconds of each stage; the time of a nested stage does not count for the outer one.

    GPU work is asynchronous: its time appears in the stage that waits for it.
    """

    def __init__(self) -> None:
        self._spent: dict[Stage, float] = {}
        self._open: list[Stage] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, stage: Stage) -> Iterator[None]:
        self._count()
        self._open.append(stage)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Seconds spent in each stage since the last call, as STAGE_seconds."""
        spent = {f"{stage}_seconds": round(seconds, 6) for stage, seconds in self._spent.items()}
        self._spent.clear()
        return spent

    def _count(self) -> None:
        now = time.perf_counter()
        if self._open:
            stage = self._open[-1]
            self._spent[stage] = self._spent.get(stage, 0.0) + now - self._since
        self._since = now


class TimedGather:
    """A gather that is timed."""

    def __init__(self, gather: Gather, timer: StepTimer) -> None:
        self._gather, self._timer = gather, timer
        self.rank, self.world_size = gather.rank, gather.world_size

    def rows(self, local: Shaped[Tensor, "n *dims"]) -> Shaped[Tensor, "world_size*n *dims"]:
        with self._timer("gather"):
            return self._gather.rows(local)

    def uneven_rows(self, local: Shaped[Tensor, "n *dims"]) -> Shaped[Tensor, "total *dims"]:
        with self._timer("gather"):
            return self._gather.uneven_rows(local)

    def total(self, local: Tensor) -> Tensor:
        with self._timer("gather"):
            return self._gather.total(local)
