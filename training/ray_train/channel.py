"""Between a run's workers and its driver: events one way, the wish to stop the other."""

# Whoever runs the actor imports this file: nothing that takes seconds.
import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import Any, cast

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from training.ray_train.nodes import Head, draining_nodes

# How often workers ask whether they shall stop, and how often the driver looks for reasons.
_ASK_SECONDS, _LOOK_SECONDS = 1.0, 0.25

# A worker that hears nothing but errors of its channel for so long has lost it.
_LOST_SECONDS = 5.0


class _Channel:
    def __init__(self) -> None:
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._stopping = False
        self._nodes: set[str] = set()

    async def put(self, event: Any) -> None:
        await self._events.put(event)

    async def get(self) -> Any:
        return await self._events.get()

    async def join(self, node: str) -> None:
        self._nodes.add(node)

    async def nodes(self) -> set[str]:
        return self._nodes

    async def stop(self) -> None:
        self._stopping = True

    async def stopping(self) -> bool:
        return self._stopping


class WorkerEnd:
    """A worker's end of the channel."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def join(self) -> None:
        """Tell the driver that a worker is on this node."""
        ray.get(self._actor.join.remote(ray.get_runtime_context().get_node_id()))

    def put(self, event: dict[str, Any]) -> None:
        """Hand an event to the driver's `progress`."""
        ray.get(self._actor.put.remote(event))

    def watch(self) -> Callable[[], bool]:
        """Whether the driver wishes the run to stop, as known a second ago.

        A worker whose channel is lost, or its cluster's head, is nobody's, and ends: it may wait for other
        workers that have ended, and Ray itself would leave it for a minute.
        """
        stopping, head = Event(), Head()

        def ask() -> None:
            # Counted from the first that fails: a process may have been stopped for longer, and be continued.
            failing_since: float | None = None
            while not head.lost():
                try:
                    if ray.get(self._actor.stopping.remote(), timeout=_LOST_SECONDS):
                        stopping.set()
                    failing_since = None
                except GetTimeoutError:  # It is busy.
                    failing_since = None
                except RayError:
                    failing_since = failing_since or time.monotonic()
                    if time.monotonic() - failing_since > _LOST_SECONDS:
                        break
                time.sleep(_ASK_SECONDS)
            os._exit(1)

        _start(ask)
        return stopping.is_set


@contextmanager
def open_channel(
    progress: Callable[[dict[str, Any]], None], stopping: Callable[[], bool]
) -> Iterator[WorkerEnd]:
    """A channel whose events reach `progress` in this process until the block ends.

    The workers are told to stop once `stopping()`, or once a node that has one of them is being drained, or
    once `progress` has raised an exception, which the block then ends with.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(_Channel).options(num_cpus=0, scheduling_strategy=here)
    channel: Any = actor.remote()
    ended, failures, head = Event(), list[BaseException](), Head()

    # Where the channel's process is lost, its workers fail, and whoever waits for them hears why.
    def pump() -> None:
        with suppress(RayError):
            while event := cast("dict[str, Any] | None", ray.get(channel.get.remote())):
                if not failures:
                    try:
                        progress(event)
                    except BaseException as error:
                        failures.append(error)

    def watch() -> None:
        with suppress(RayError):
            while not ended.wait(_LOOK_SECONDS):
                # Ray ends a process that has asked a head which is gone, a minute later.
                if head.lost():
                    return
                leaving = head.answers and draining_nodes().intersection(ray.get(channel.nodes.remote()))
                if failures or stopping() or leaving:
                    ray.get(channel.stop.remote())
                    return

    threads = [_start(pump), _start(watch)]
    try:
        yield WorkerEnd(channel)
    finally:
        ended.set()
        try:
            ray.get(channel.put.remote(None))
            for thread in threads:
                thread.join()
            ray.kill(channel)
        except RayError:
            pass  # The cluster is gone, and with it the channel.
        if failures:
            raise failures[0]


def _start(work: Callable[[], None]) -> Thread:
    """Do it in a thread, which ends silently where the channel or the cluster is gone: others report that."""

    def run() -> None:
        with suppress(RayError):
            work()

    thread = Thread(target=run, daemon=True)
    thread.start()
    return thread
