"""Real gloo ranks for the tests: worker processes that stay up and form a new process group for each call."""

import importlib.util
import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT_SECONDS = 120.0


class Ranks:
    """Worker processes, started when first needed: importing torch costs each of them seconds."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[Any, connection.Connection]] = []

    def run(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout_seconds: float = _TIMEOUT_SECONDS,
    ) -> list[Any]:
        """function(*args) in each of `world_size` ranks of a new process group; the results by rank.

        `function` stands at the top of its module, which the ranks load from its file. A rank that waits for
        another for more than `timeout_seconds` fails.
        Raises RuntimeError with the traceback if a rank fails, TimeoutError if one takes too long.
        """
        try:
            while len(self._workers) < world_size:
                self._start_worker()
            pipes = [pipe for _, pipe in self._workers[:world_size]]
            with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
                for rank, pipe in enumerate(pipes):
                    where = (f"file://{folder}/store", rank, world_size, timeout_seconds)
                    pipe.send_bytes(
                        pickle.dumps((function.__code__.co_filename, function.__name__, args, where))
                    )
                return _results(pipes)
        except BaseException:
            self.close()  # The other ranks may wait for the failed one for ever.
            raise

    def close(self) -> None:
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers.clear()

    def _start_worker(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._workers.append((process, ours))


def _results(pipes: list[connection.Connection]) -> list[Any]:
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = sorted(set(range(len(pipes))) - set(results))
            raise TimeoutError(f"ranks {missing} gave no result in {_TIMEOUT_SECONDS:g} s")
        for rank, pipe in enumerate(pipes):
            if pipe in ready:
                results[rank] = _result(rank, pipe)
    return [results[rank] for rank in range(len(pipes))]


def _result(rank: int, pipe: connection.Connection) -> Any:
    try:
        failure, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        failure, value = "its process died", None
    if failure:
        raise RuntimeError(f"rank {rank} failed: {failure}")
    return value


def _serve(pipe: connection.Connection) -> None:
    """What a worker process does until its pipe is closed."""
    torch.set_num_threads(1)
    while True:
        try:
            path, name, args, where = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = None, _call(getattr(_load(path), name), args, *where)
        except BaseException:
            answer = traceback.format_exc(), None
        pipe.send_bytes(pickle.dumps(answer))


def _call(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    store: str,
    rank: int,
    world_size: int,
    timeout_seconds: float,
) -> Any:
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=timeout)
    result = function(*args)
    dist.barrier()  # No rank leaves while another still hears from it.
    dist.destroy_process_group()
    return result


def _load(path: str) -> ModuleType:
    """The module in the file `path`; under --import-mode=importlib its name leads nowhere in this process."""
    name = Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec
        assert spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
