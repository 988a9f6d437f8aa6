"""Workers that stay alive between runs, so that the next run does not wait for processes to start."""

import asyncio
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Event
from typing import Any, cast

import pyarrow as pa
import ray
import torch

from pipelines.index import Index
from training.config import TrainConfig
from training.evaluation.evaluator import Sets
from training.metrics import Progress
from training.process import Worker
from training.ray_train.launch import Task, in_thread, launch_group, watched

_LOOK_SECONDS = 0.2

_DONE = "done with task"

# The group itself has no images; each task has its own.
_NONE = Sets(Index("", "folder", pa.table({})))


@dataclass(frozen=True, eq=False)
class _QueuedTask:
    """A task; `sets` is a reference, so that workers fetch the index of images once for many tasks."""

    config: TrainConfig
    sets: ray.ObjectRef
    task: Task


class _TaskQueue:
    """The tasks of a pool's workers, in order; each worker gets all of them."""

    def __init__(self, idle_seconds: float) -> None:
        self._tasks: list[Any] = []
        self._idle_seconds = idle_seconds
        self._closed = False
        self._changed = asyncio.Condition()

    async def add(self, task: Any) -> bool:
        """Add a task; False if the workers have left."""
        async with self._changed:
            if not self._closed:
                self._tasks.append(task)
            self._changed.notify_all()
            return not self._closed

    async def close(self) -> None:
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def get(self, number: int) -> Any:
        """Wait for the task of that number; None once the queue is closed, which idleness does too."""
        async with self._changed:
            there = self._changed.wait_for(lambda: self._closed or number < len(self._tasks))
            try:
                await asyncio.wait_for(there, self._idle_seconds)
            except TimeoutError:
                self._closed = True
                self._changed.notify_all()
            return self._tasks[number] if number < len(self._tasks) else None


class WorkerPool:
    """A group of workers that does one task after another; a lost worker ends only its task and the group.

    Workers that wait longer than `idle_seconds` for their next task release their resources.
    """

    def __init__(self, *, idle_seconds: float = 30.0) -> None:
        self._idle_seconds = idle_seconds
        self._group: Future[None] | None = None
        self._queue: Any = None
        self._size = 0
        self._sets: Sets | None = None
        self._reference: Any = None
        self._given = 0
        self._events: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._ending = Event()

    def launch(
        self,
        config: TrainConfig,
        sets: Sets,
        progress: Progress,
        task: Task,
        *,
        workers: int,
        stopping: Any,
        since: float | None = None,
    ) -> None:
        """As launch.launch, but reuses the workers of the task before if their number is the same.

        If `progress` or `stopping` raises an exception, the workers save and stop.
        """
        group = self._group_for(config, workers, _QueuedTask(config, self._shared(sets), task), since)
        number = self._given
        self._given += 1
        done = {_DONE: number}
        event: dict[str, Any] = {}
        try:
            while event != done:
                if stopping():
                    self._ending.set()
                if group.done() and self._events.empty():
                    group.result()  # Raises the task's error.
                    raise RuntimeError("the workers left while they had a task")
                with suppress(Empty):
                    event = self._events.get(timeout=_LOOK_SECONDS)
                    if event != done:
                        progress(event)
        except BaseException:
            self._ending.set()  # The caller no longer waits for the task.
            raise

    def close(self) -> None:
        """End the workers."""
        if self._group and not self._group.done():
            ray.get(self._queue.close.remote())
            self._group.exception()
        self._group = None

    def _shared(self, sets: Sets) -> ray.ObjectRef:
        """A reference to the sets in Ray's object store, shared by tasks with the same sets."""
        if sets is not self._sets:
            self._sets, self._reference = sets, ray.put(sets)
        return self._reference

    def _group_for(
        self, config: TrainConfig, workers: int, queued: _QueuedTask, since: float | None
    ) -> Future[None]:
        """A group of workers to which the task was added, new if needed."""
        group = self._group
        same = group and not group.done() and not self._ending.is_set() and workers == self._size
        if group and same and ray.get(self._queue.add.remote(queued)):
            return group
        self.close()
        self._size, self._given = workers, 0
        self._events, self._ending = SimpleQueue(), Event()
        self._queue = ray.remote(_TaskQueue).options(num_cpus=0).remote(self._idle_seconds)
        assert ray.get(self._queue.add.remote(queued))
        serve = partial(_serve, queue=self._queue)
        begin = partial(launch_group, config, _NONE, self._events.put, serve, workers=workers)
        self._group = in_thread(partial(begin, stopping=self._ending.is_set, since=since))
        return self._group


def _serve(config: TrainConfig, sets: Sets, worker: Worker, progress: Progress, *, queue: Any) -> None:
    """Do all tasks of a pool on one of its workers; `config` is the first task's."""
    number, reference = 0, None
    while queued := cast("_QueuedTask | None", ray.get(queue.get.remote(number))):
        if queued.sets != reference:
            reference, sets = queued.sets, cast(Sets, ray.get(queued.sets))
            worker.cache.clear()
        watched(queued.config, sets, worker, progress, task=queued.task)
        # Wait until each worker has done the task and sent all its events.
        worker.gather.total(torch.zeros(1, device=worker.device))
        if worker.gather.rank == 0:
            progress({_DONE: number})
        number += 1
