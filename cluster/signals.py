"""SIGTERM and Ctrl-C: the first asks a run to save and to end, the second ends it at once."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, current_thread, main_thread
from types import FrameType


class Interrupted(Exception):  # noqa: N818
    """A signal of this number has ended the work, which is saved; the message says how to go on."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class Stop:
    """Whether a run shall end, and the signal that asked for it; what is said then is `doing`.

    Others may set `event` too; then there is no signal, and `number` is 0.
    """

    def __init__(self, doing: str, event: Event | None = None) -> None:
        self._doing = doing
        self.event = event or Event()
        self.number = 0

    def ask(self, number: int, frame: FrameType | None) -> None:
        """A handler of signals; raises KeyboardInterrupt the second time."""
        if self.event.is_set():
            raise KeyboardInterrupt
        self.number = number
        self.event.set()
        print(f"\ndiptych: {self._doing}; once more ends at once", file=sys.stderr)


@contextmanager
def stop_signals(doing: str, event: Event | None = None) -> Iterator[Stop]:
    """What the signals ask for until the block ends; nothing does outside the main thread."""
    stop = Stop(doing, event)
    if current_thread() is not main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
