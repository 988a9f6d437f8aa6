"""A lease in a run's folder, so that only one process at a time writes there."""

import math
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event, Thread

from pipelines import storage
from pipelines.storage.checksums import checked_json, json_with_checksum
from training.errors import UnsavedError
from training.run_folder import unwritable

_FILE = "lease.json"

# A killed process cannot remove its lease: one that was not renewed for so long has expired.
_RENEW_SECONDS, _EXPIRY_SECONDS, _LOOK_SECONDS = 10.0, 45.0, 1.0

# Clocks do not differ by so much: an older lease has expired in any case.
_OLD_SECONDS = 900.0

# Other processes, such as a report, write into the folder too: a partial file this old is abandoned.
_LEFT_SECONDS = 300.0

# If two processes start at once, each checks after this time whether the other wrote its lease later.
_SETTLE_SECONDS = 0.3

# Leases of this process that have ended; one that could not be removed does not block this process.
_ended = set[str]()


@dataclass(frozen=True)
class Lease:
    """The process that writes into a folder. `started`: clock ticks from its machine's boot to its start."""

    key: str
    host: str
    machine: str
    process: int
    started: str
    renewed: float

    @classmethod
    def of_this_process(cls) -> "Lease":
        """A new lease for this process."""
        process = os.getpid()
        return cls(
            secrets.token_hex(8), socket.gethostname(), _machine(), process, _started(process), time.time()
        )

    @property
    def dead(self) -> bool:
        """Whether its process is known to have ended; False for processes on other machines."""
        return self.machine == _machine() and _started(self.process) != self.started


# A lease whose checksum does not match. Its holder writes it again at the next renewal.
_DAMAGED = Lease("", "", "", 0, "", math.inf)


@dataclass(frozen=True)
class Held:
    """A reference to the lease that a command holds on a folder, for its workers.

    Workers check it themselves, since a suspended driver does not notice that it has lost the lease.
    """

    folder: str
    key: str

    def check(self) -> None:
        """Raise UnsavedError if another process has taken the lease, OSError if it cannot be read."""
        holder = _read(storage.join(self.folder, _FILE))
        if holder is _DAMAGED:
            return  # A process that takes it over writes a complete one.
        if holder and holder.key != self.key:
            raise UnsavedError(
                f"process {holder.process} on {holder.host} has taken {self.folder} over; wait until it ends"
            )
        if holder is None:
            raise UnsavedError(f"another process has taken {self.folder} over, and has ended; resume it")


@contextmanager
def leased(folder: str, taken: Event) -> Iterator[Held]:
    """Hold the folder's lease until the block ends; set `taken` if another process takes it meanwhile.

    A lease that a process on another machine no longer renews is taken over after 45 seconds. Partial files
    of killed writers are removed from the folder. Raises ValueError where another process holds the lease, or
    where the folder cannot be written.
    """
    place, mine = storage.join(folder, _FILE), Lease.of_this_process()
    _wait_for(folder, place)
    ended = Event()

    def renew() -> None:
        renewed = time.monotonic()
        while not ended.wait(_RENEW_SECONDS):
            with suppress(OSError, ValueError):  # Retried at the next renewal.
                holder = _read(place)
                if holder is _DAMAGED and time.monotonic() - renewed < _EXPIRY_SECONDS:
                    holder = mine  # Nobody can have taken it over yet.
                # If there is no lease, another process took it over and has ended.
                if holder is None or holder.key != mine.key:
                    taken.set()
                    return
                if not ended.is_set():
                    _write(place, replace(mine, renewed=time.time()))
                    renewed = time.monotonic()

    thread = Thread(target=renew, daemon=True)
    try:
        _take(folder, place, mine)
        _clear(folder)
        thread.start()
        yield Held(folder, mine.key)
    finally:
        ended.set()
        _ended.add(mine.key)
        if thread.is_alive():
            thread.join(_LOOK_SECONDS)
        # Do not wait long: a lease that stays expires.
        with suppress(OSError, ValueError), storage.briefly():
            if (holder := _read(place)) and holder.key == mine.key:
                _clear(folder)
                storage.remove(place)


def _take(folder: str, place: str, mine: Lease) -> None:
    try:
        _write(place, mine)
    except OSError as error:
        raise unwritable(folder, error) from error
    time.sleep(_SETTLE_SECONDS)
    holder = _read(place)
    if holder and holder is not _DAMAGED and holder.key != mine.key:
        raise _refused(folder, holder)


def _clear(folder: str) -> None:
    """Remove partial files of killed writers; at once where only the holder of the lease writes."""
    with suppress(OSError, ValueError):
        storage.remove_partials(folder, of=_FILE)
        storage.remove_partials(storage.join(folder, "checkpoints"))
        storage.remove_partials(folder, older_than=_LEFT_SECONDS)


def _wait_for(folder: str, place: str) -> None:
    """Return once the lease is free; raise ValueError where another process holds it.

    A damaged lease may be held: its holder would write it again before it expires.
    """
    holder = first = _read(place)
    deadline = time.monotonic() + _EXPIRY_SECONDS
    while holder and not holder.dead and holder.key not in _ended:
        if holder != first or holder.machine == _machine():
            raise _refused(folder, holder)
        if time.monotonic() > deadline or time.time() - holder.renewed > _OLD_SECONDS:
            return
        time.sleep(_LOOK_SECONDS)
        holder = _read(place)


def _refused(folder: str, holder: Lease) -> ValueError:
    return ValueError(
        f"{folder} is being written by process {holder.process} on {holder.host}; wait until it ends, or "
        "choose another --name"
    )


def _read(place: str) -> Lease | None:
    """The lease at `place`; None where there is none, _DAMAGED where the file is not what was written."""
    content = storage.read(place)
    if content is None:
        return None
    try:
        lease = Lease(**checked_json(content))
    except (ValueError, TypeError):
        return _DAMAGED
    return lease if isinstance(lease.renewed, float) else _DAMAGED


def _write(place: str, lease: Lease) -> None:
    storage.write(place, json_with_checksum(asdict(lease)).encode())


def _machine() -> str:
    """The boot and PID namespace of this process: within them, process IDs identify processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # Not on Linux.
        return socket.gethostname()


def _started(process: int) -> str:
    """Start of the process, in clock ticks since its machine's boot; empty where there is no such process."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
