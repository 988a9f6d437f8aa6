"""Where the time goes from a command to the first step of its run."""

import os
import time
from pathlib import Path


class Startup:
    """The seconds of each phase until the next is reached."""

    def __init__(self, began: float | None = None) -> None:
        """`began` on the clock of time.monotonic; unset: now."""
        self._began = self._reached = time.monotonic() if began is None else began
        self._phases: list[tuple[str, float]] = []

    @classmethod
    def of_the_command(cls) -> "Startup":
        """From the start of this process on."""
        # The 22nd field, in ticks since the machine's start; the second is a name that may hold spaces.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = float(fields[19]) / os.sysconf("SC_CLK_TCK")
        return cls(time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks))

    def reached(self, phase: str) -> None:
        """`phase` is over."""
        now = time.monotonic()
        self._phases.append((phase, now - self._reached))
        self._reached = now

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self._phases)
        return f"first step after {self._reached - self._began:.1f} s: {phases}"
