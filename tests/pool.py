"""Training workers that stay from one test to the next."""

import math
from collections.abc import Callable
from typing import Any


class Pool:
    """Training workers that stay for the next test: one group of one, one of two."""

    def __init__(self) -> None:
        self._groups: dict[int, Any] = {}

    def launch(self, *task: Any, workers: int, stopping: Callable[[], bool], **others: Any) -> None:
        """As training.worker.launch, on workers that are there already."""
        from training.ray_train.worker_pool import WorkerPool

        group = self._groups.setdefault(workers, WorkerPool(idle_seconds=math.inf))
        group.launch(*task, workers=workers, stopping=stopping, **others)

    def close(self) -> None:
        """Let the workers go, for a test that needs the cluster's room."""
        for group in self._groups.values():
            group.close()
        self._groups.clear()
