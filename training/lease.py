"""One process at a time writes into a run's folder: a lease there, which it renews while it does."""

import json
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
from training.errors import UnsavedError
from training.run_folder import unwritable

_FILE = "lease.json"

# Whoever was killed elsewhere cannot take its lease back: one that nobody renews for so long has expired.
_RENEW_SECONDS, _EXPIRY_SECONDS, _LOOK_SECONDS = 10.0, 45.0, 1.0

# So far apart clocks are not: an older lease has expired, whatever they say.
_OLD_SECONDS = 900.0

# Others write into the folder too, as a report is: half a file that old has lost its writer.
_LEFT_SECONDS = 300.0

# Of two processes that begin at once each looks, after so long, whether the other has written after it.
_SETTLE_SECONDS = 0.3

# Leases of this process that have ended: one that could not be removed hinders nobody here.
_ended = set[str]()


@dataclass(frozen=True)
class Lease:
    """Who writes into a folder: its process, which started so many ticks after its machine."""

    key: str
    host: str
    machine: str
    process: int
    started: str
    renewed: float

    @classmethod
    def own(cls) -> "Lease":
        """This process's."""
        process = os.getpid()
        return cls(
            secrets.token_hex(8), socket.gethostname(), _machine(), process, _started(process), time.time()
        )

    @property
    def dead(self) -> bool:
        """Whether its process is known to have ended; elsewhere nobody knows."""
        return self.machine == _machine() and _started(self.process) != self.started


@dataclass(frozen=True)
class Held:
    """The lease that a command has on a folder, as its workers know it.

    They look for themselves: a driver that is halted does not notice that it has lost the lease.
    """

    folder: str
    key: str

    def check(self) -> None:
        """Raises UnsavedError where another process has taken the lease, OSError where nobody can tell."""
        holder = _read(storage.join(self.folder, _FILE))
        if holder and holder.key != self.key:
            raise UnsavedError(
                f"process {holder.process} on {holder.host} has taken {self.folder} over; wait for its end"
            )
        if holder is None:
            raise UnsavedError(f"another process has taken {self.folder} over, and has ended; resume it")


@contextmanager
def leased(folder: str, taken: Event) -> Iterator[Held]:
    """Hold the folder's lease until the block ends; sets `taken` should another process take it meanwhile.

    One that a process elsewhere has left, and does not renew, is taken over after 45 seconds. Parts of files
    that killed writers have left in the folder are removed. Raises ValueError where another process has the
    lease, or where nothing can be written.
    """
    place, own = storage.join(folder, _FILE), Lease.own()
    _wait_for(folder, place)
    ended = Event()

    def renew() -> None:
        while not ended.wait(_RENEW_SECONDS):
            with suppress(OSError, ValueError):  # The next time, then.
                holder = _read(place)
                # Without a lease, another process had taken it over, and has ended.
                if holder is None or holder.key != own.key:
                    taken.set()
                    return
                if not ended.is_set():
                    _write(place, replace(own, renewed=time.time()))

    thread = Thread(target=renew, daemon=True)
    try:
        _take(folder, place, own)
        _clear(folder)
        thread.start()
        yield Held(folder, own.key)
    finally:
        ended.set()
        _ended.add(own.key)
        if thread.is_alive():
            thread.join(_LOOK_SECONDS)
        # Nobody waits for long for a lease that stays.
        with suppress(OSError, ValueError), storage.briefly():
            if (holder := _read(place)) and holder.key == own.key:
                _clear(folder)
                storage.remove(place)


def _take(folder: str, place: str, own: Lease) -> None:
    try:
        _write(place, own)
    except OSError as error:
        raise unwritable(folder, error) from error
    time.sleep(_SETTLE_SECONDS)
    if (holder := _read(place)) and holder.key != own.key:
        raise _refused(folder, holder)


def _clear(folder: str) -> None:
    """Remove what killed writers have left: at once where only the lease's holder writes."""
    with suppress(OSError, ValueError):
        storage.remove_partials(folder, of=_FILE)
        storage.remove_partials(storage.join(folder, "checkpoints"))
        storage.remove_partials(folder, older_than=_LEFT_SECONDS)


def _wait_for(folder: str, place: str) -> None:
    """Return once nobody has the lease; ValueError where somebody does."""
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
        f"{folder} is being written by process {holder.process} on {holder.host}; wait for its end, or "
        "choose another --name"
    )


def _read(place: str) -> Lease | None:
    """The lease there; none where there is none, or what is there is no lease."""
    content = storage.read(place)
    try:
        lease = Lease(**json.loads(content)) if content else None
    except (ValueError, TypeError):
        return None
    return lease if lease and isinstance(lease.renewed, float) else None


def _write(place: str, lease: Lease) -> None:
    storage.write(place, json.dumps(asdict(lease)).encode())


def _machine() -> str:
    """What all processes have in common that see each other by their numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # Not on Linux.
        return socket.gethostname()


def _started(process: int) -> str:
    """When the process started, in ticks since its machine did; nothing where there is no such process."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
