"""SIGTERM and Ctrl-C: the first asks a run to save and end, the second ends it at once."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, current_thread, main_thread
from types import FrameType


class Interrupted(Exception):  # noqa: N818
    """A signal of this number ended the work, which is saved; the message says how to resume."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class Stop:
    """Whether the run should end, and the signal that asked for it; `doing` is printed then.

    If other code sets `event`, there is no signal, and `number` is 0.
    """

    def __init__(self, doing: str, event: Event | None = None) -> None:
        self._doing = doing
        self.event = event or Event()
        self.number = 0

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Signal handler; raises KeyboardInterrupt the second time."""
        if self.event.is_set():
            raise KeyboardInterrupt
        self.number = number
        self.event.set()
        print(f"\ndiptych: {self._doing}; a second signal ends it at once", file=sys.stderr)


@contextmanager
def stop_signals(doing: str, event: Event | None = None) -> Iterator[Stop]:
    """Handle the signals until the block ends; outside the main thread, none are handled."""
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
