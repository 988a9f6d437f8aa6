"""Workers that stay between runs, so that the next does not wait for processes to start and to import."""

import asyncio
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Event
from typing import Any, cast

import ray

from training.config import TrainConfig
from training.evaluator import Sets
from training.process import Worker
from training.runlog import Progress
from training.worker import Task, in_thread, launch_group, watched

# Workers that wait longer than this for their next task leave their place to others.
_IDLE_SECONDS = 30.0

_LOOK_SECONDS = 0.2

_DONE = "done with task"


@dataclass(frozen=True, eq=False)
class _Order:
    config: TrainConfig
    task: Task


class _Orders:
    """What the workers of a crew are to do, one after the other; all of them get all of it."""

    def __init__(self) -> None:
        self._orders: list[Any] = []
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
                await asyncio.wait_for(there, _IDLE_SECONDS)
            except TimeoutError:
                self._closed = True
                self._changed.notify_all()
            return self._orders[number] if number < len(self._orders) else None


class Crew:
    """A group of workers that does one task after another; a lost one ends the task and the group alone."""

    def __init__(self) -> None:
        self._group: Future[None] | None = None
        self._orders: Any = None
        self._size, self._sets = 0, None
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
    ) -> None:
        """As worker.launch, on the workers of the task before it where there are as many."""
        group = self._group_for(config, sets, workers, _Order(config, task))
        number = self._given
        self._given += 1
        done = {_DONE: number}
        event: dict[str, Any] = {}
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

    def close(self) -> None:
        """Let the workers go."""
        if self._group and not self._group.done():
            ray.get(self._orders.close.remote())
            self._group.exception()
        self._group = None

    def _group_for(self, config: TrainConfig, sets: Sets, workers: int, order: _Order) -> Future[None]:
        """A group that has taken the order."""
        group = self._group
        same = group and not group.done() and (workers, sets) == (self._size, self._sets)
        if group and same and ray.get(self._orders.add.remote(order)):
            return group
        self.close()
        self._size, self._sets, self._given = workers, sets, 0
        self._events, self._ending = SimpleQueue(), Event()
        self._orders = ray.remote(_Orders).options(num_cpus=0).remote()
        assert ray.get(self._orders.add.remote(order))
        serve = partial(_serve, orders=self._orders)
        stopping = self._ending.is_set
        self._group = in_thread(
            partial(launch_group, config, sets, self._events.put, serve, workers=workers, stopping=stopping)
        )
        return self._group


def _serve(config: TrainConfig, sets: Sets, worker: Worker, progress: Progress, *, orders: Any) -> None:
    """What each worker of a crew does; the config is that of the first task alone."""
    number = 0
    while order := cast("_Order | None", ray.get(orders.get.remote(number))):
        watched(order.config, sets, worker, progress, task=order.task)
        if worker.gather.rank == 0:
            progress({_DONE: number})
        number += 1
