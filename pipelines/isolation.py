"""A process of its own for work that may crash: a decoder's crash then costs one image, and names it."""

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

# How the reason begins for which an image is bad that has ended a process.
ENDS_PROCESS = "decoding it ends the process"

_LENGTH = struct.Struct("<Q")

_SERVE = "from pipelines.isolation import serve; serve()"


@dataclass(frozen=True)
class Crash:
    """The end of the process that worked on an item; `signal` is its number, None where it exited."""

    signal: int | None

    def __str__(self) -> str:
        how = signal.Signals(self.signal).name if self.signal else "an exit"
        return f"{ENDS_PROCESS} ({how})"


class Isolated(Generic[Item, Result]):
    """`work` in a process of its own, which is started when first needed and again after each crash.

    `work` is a function at the top of a module that imports nothing that is not needed.
    """

    def __init__(self, work: Callable[[Item], Result]) -> None:
        self._work = work
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = Lock()

    def each(self, items: Iterable[Item]) -> Iterator[Result | Crash]:
        """For each item, in order, what `work` returns, or the crash that it has caused.

        Raises what `work` raises.
        """
        for item in items:
            with self._lock:
                answer = self._one(item)
            if isinstance(answer, BaseException):
                raise answer
            yield answer

    def close(self) -> int | None:
        """End the process; its exit code, the number of a signal being negative."""
        process, self._process = self._process, None
        if process is None:
            return None
        assert process.stdin
        assert process.stdout
        with suppress(BrokenPipeError):  # It is gone, and something was left to write.
            process.stdin.close()
        process.stdout.close()
        return process.wait()

    def _one(self, item: Item) -> Any:
        process = self._process = self._process or _start(self._work)
        assert process.stdin
        assert process.stdout
        try:
            _send(process.stdin, item)
            return _receive(process.stdout)
        except (BrokenPipeError, EOFError):
            code = self.close() or 0
            return Crash(-code if code < 0 else None)


def _start(work: Callable[[Any], Any]) -> "subprocess.Popen[bytes]":
    # It finds the packages where this process does, and -P nowhere else; it ends when its input does.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _SERVE], env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    try:
        _send(process.stdin, work)
        _receive(process.stdout)
    except (BrokenPipeError, EOFError) as error:
        raise RuntimeError(f"{sys.executable} ends before it can work on anything") from error
    return process


def serve() -> None:
    """Answer items on standard input until it ends: the work of the process."""
    source = sys.stdin.buffer
    # Whatever a library prints goes nowhere, and not among the answers.
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for the answers.
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
