"""Other processes that hold the lease of a folder, for tests of what happens once they have lost it."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event

from pipelines import storage
from training.lease import Held, leased

_HOLD = """
import sys
from threading import Event
from training import lease
from training.lease import leased
if sys.argv[2:]:  # On another machine, as far as leases tell.
    lease._machine, lease._RENEW_SECONDS = lambda: sys.argv[2], 0.05
with leased(sys.argv[1], Event()):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: str, *machine: str) -> Iterator[subprocess.Popen]:
    """Another process that holds the folder's lease until its input ends, or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, folder, *machine],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def held_there(folder: str) -> Held:
    """The lease that is on the folder, as the workers of its holder know it."""
    return Held(folder, json.loads(storage.read(f"{folder}/lease.json") or b"")["key"])


@contextmanager
def taken_over(folder: str, process: subprocess.Popen) -> Iterator[Held]:
    """Halt the holder of the folder's lease, and take that over until the block ends."""
    process.send_signal(signal.SIGSTOP)
    try:
        with leased(folder, Event()) as held:
            yield held
    finally:
        process.send_signal(signal.SIGCONT)
