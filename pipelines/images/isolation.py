"""Run work that may crash in a separate process, so that a decoder's crash costs only one image."""

import os
import pickle
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import IO, Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# How the reason begins for an image that crashed a process.
ENDS_PROCESS = "decoding it ends the process"

_LENGTH = struct.Struct("<Q")

_SERVE = "from pipelines.images.isolation import serve; serve({})"


@dataclass(frozen=True)
class Crash:
    """The process ended while it worked on an item. signal: the signal's number, None if it exited."""

    signal: int | None

    def __str__(self) -> str:
        how = signal.Signals(self.signal).name if self.signal else "an exit"
        return f"{ENDS_PROCESS} ({how})"


class Isolated(Generic[Item, Result]):
    """Runs `work` in a separate process, started on first use and again after each crash.

    `work` is a function at the top level of a module, which should import little.
    """

    def __init__(self, work: Callable[[Item], Result]) -> None:
        self._work = work
        self._process: _Process | None = None
        self._lock = Lock()
        # A fork of this process must not share the worker process.
        os.register_at_fork(after_in_child=self._forget)

    def each(self, items: Iterable[Item]) -> Iterator[Result | Crash]:
        """Yield the result of `work` for each item, in order, or the crash that it caused.

        Raises the errors that `work` raises.
        """
        for item in items:
            with self._lock:
                answer = self._one(item)
            if isinstance(answer, BaseException):
                raise answer
            yield answer

    def close(self) -> int | None:
        """End the process. Returns its exit code; a signal is negative, None means no process."""
        process, self._process = self._process, None
        return process.end() if process else None

    def _forget(self) -> None:
        if self._process:
            self._process.forget()
        self._process, self._lock = None, Lock()

    def _one(self, item: Item) -> Any:
        self._process = self._process or _Process(self._work)
        try:
            return self._process.ask(item)
        except (BrokenPipeError, EOFError):
            code = self.close() or 0
            return Crash(-code if code < 0 else None)
        except BaseException:  # After an interrupt, the next answer would belong to this item.
            self._process.kill()
            self.close()
            raise


class _Process:
    """A process that runs `work`; it ends when its input ends."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        source, sink = os.pipe()  # Not stdout, where libraries may print.
        command = [sys.executable, "-P", "-c", _SERVE.format(sink)]
        self._process = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": _python_path()},
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[sink],
        )  # fmt: skip
        os.close(sink)
        assert self._process.stdin
        self._items, self._answers = self._process.stdin, os.fdopen(source, "rb")
        try:
            self.ask(work)
        except BaseException as error:
            self.kill()
            self.end()
            if isinstance(error, (BrokenPipeError, EOFError)):
                raise RuntimeError(f"{sys.executable} exits before it can do any work") from error
            raise

    def ask(self, item: Any) -> Any:
        _send(self._items, item)
        return _receive(self._answers)

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> int:
        """Close its input, wait for its end, return its exit code."""
        self._close()
        return self._process.wait()

    def forget(self) -> None:
        """Leave it to the parent of this forked process."""
        self._close()
        self._process.returncode = 0

    def _close(self) -> None:
        with suppress(BrokenPipeError):  # It has ended before reading all of its input.
            self._items.close()
        self._answers.close()


def _python_path() -> str:
    """The search path of this process; with -P the other process searches nothing else."""
    found = []
    for path in sys.path:
        with suppress(FileNotFoundError):  # The working directory may have been deleted.
            found.append(path or os.getcwd())
    return os.pathsep.join(found)


def serve(answers: int) -> None:
    """The process's main loop: read items from standard input, write results to file descriptor `answers`."""
    source, sink = sys.stdin.buffer, os.fdopen(answers, "wb")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent process.
    work = _receive(source)
    _send(sink, "ready")
    while True:
        try:
            item = _receive(source)
        except EOFError:
            return
        try:
            answer = work(item)
        except Exception as error:
            answer = error
        _send(sink, answer)


def _send(stream: IO[bytes], value: Any) -> None:
    content = pickle.dumps(value)
    stream.write(_LENGTH.pack(len(content)) + content)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    header = stream.read(_LENGTH.size)
    content = stream.read(_LENGTH.unpack(header)[0]) if len(header) == _LENGTH.size else b""
    if not content:
        raise EOFError
    return pickle.loads(content)
