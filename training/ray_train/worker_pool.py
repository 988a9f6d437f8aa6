"""Workers that stay between runs, so that the next does not wait for processes to start and to import."""

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

# The group itself has no images: each task brings its own.
_NONE = Sets(Index("", "folder", pa.table({})))


@dataclass(frozen=True, eq=False)
class _Order:
    """A task to do; `sets` is a reference, so that workers fetch the images' index once for many tasks."""

    config: TrainConfig
    sets: ray.ObjectRef
    task: Task


class _Orders:
    """What the workers of a crew are to do, one after the other; all of them get all of it."""

    def __init__(self, idle_seconds: float) -> None:
        self._orders: list[Any] = []
        self._idle_seconds = idle_seconds
        self._closed = False
        self._changed = asyncio.Condition()

    async def add(self, order: Any) -> bool:
        """Whether the workers will do it; false where they have gone."""
        async with self._changed:
            if not self._closed:
                self._orders.append(order)
            self._changed.notify_all()
            return not self._closed

    async def close(self) -> None:
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def get(self, number: int) -> Any:
        """The order of that number once it is there; None where none comes, and for none after it."""
        async with self._changed:
            there = self._changed.wait_for(lambda: self._closed or number < len(self._orders))
            try:
                await asyncio.wait_for(there, self._idle_seconds)
            except TimeoutError:
                self._closed = True
                self._changed.notify_all()
            return self._orders[number] if number < len(self._orders) else None


class Crew:
    """A group of workers that does one task after another; a lost one ends the task and the group alone.

    Workers that wait longer than `idle_seconds` for their next task leave their place to others.
    """

    def __init__(self, *, idle_seconds: float = 30.0) -> None:
        self._idle_seconds = idle_seconds
        self._group: Future[None] | None = None
        self._orders: Any = None
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
        """As worker.launch, on the workers of the task before it where there are as many.

        They save and leave where `progress` or `stopping` raises an exception.
        """
        group = self._group_for(config, workers, _Order(config, self._shared(sets), task), since)
        number = self._given
        self._given += 1
        done = {_DONE: number}
        event: dict[str, Any] = {}
        try:
            while event != done:
                if stopping():
                    self._ending.set()
                if group.done() and self._events.empty():
                    group.result()  # Raises what the task has failed with.
                    raise RuntimeError("the workers left while they had a task")
                with suppress(Empty):
                    event = self._events.get(timeout=_LOOK_SECONDS)
                    if event != done:
                        progress(event)
        except BaseException:
            self._ending.set()  # Nobody waits for the task any more.
            raise

    def close(self) -> None:
        """Let the workers go."""
        if self._group and not self._group.done():
            ray.get(self._orders.close.remote())
            self._group.exception()
        self._group = None

    def _shared(self, sets: Sets) -> ray.ObjectRef:
        """The sets in Ray's object store, put there once for tasks that have the same."""
        if sets is not self._sets:
            self._sets, self._reference = sets, ray.put(sets)
        return self._reference

    def _group_for(
        self, config: TrainConfig, workers: int, order: _Order, since: float | None
    ) -> Future[None]:
        """A group that has taken the order."""
        group = self._group
        same = group and not group.done() and not self._ending.is_set() and workers == self._size
        if group and same and ray.get(self._orders.add.remote(order)):
            return group
        self.close()
        self._size, self._given = workers, 0
        self._events, self._ending = SimpleQueue(), Event()
        self._orders = ray.remote(_Orders).options(num_cpus=0).remote(self._idle_seconds)
        assert ray.get(self._orders.add.remote(order))
        serve = partial(_serve, orders=self._orders)
        begin = partial(launch_group, config, _NONE, self._events.put, serve, workers=workers)
        self._group = in_thread(partial(begin, stopping=self._ending.is_set, since=since))
        return self._group


def _serve(config: TrainConfig, sets: Sets, worker: Worker, progress: Progress, *, orders: Any) -> None:
    """Do each task of a crew, on each of its workers; the config is that of the first task alone."""
    number, reference = 0, None
    while order := cast("_Order | None", ray.get(orders.get.remote(number))):
        if order.sets != reference:
            reference, sets = order.sets, cast(Sets, ray.get(order.sets))
            worker.cache.clear()
        watched(order.config, sets, worker, progress, task=order.task)
        # Each worker has done the task, and sent all its events.
        worker.gather.total(torch.zeros(1, device=worker.device))
        if worker.gather.rank == 0:
            progress({_DONE: number})
        number += 1
