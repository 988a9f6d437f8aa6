"""The processes of Ray Train's workers on this machine, and keeping processes from going on."""

import os
import re
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# In the environment of all that these tests start: no other process on the machine is taken for theirs.
MARK = "DIPTYCH_TESTS"


def training_workers() -> dict[int, int]:
    """Each worker of these tests by its process, with the one that has started it: its node's raylet."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::RayTrainWorker"):
                raylet = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                # The worker's own environment is gone: its title has overwritten it.
                if mark in Path(f"/proc/{raylet}/environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = raylet
        except OSError:  # It has ended.
            continue
    return found


def cluster_processes(setting: str, folder: str) -> list[int]:
    """Those of a cluster: with NAME=VALUE in their environment, or titled by Ray and with its files open."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            marked = setting.encode() in (place / "environ").read_bytes().split(b"\0")
            titled = (place / "cmdline").read_bytes().startswith(b"ray")
            if marked or (titled and any(folder in os.readlink(link) for link in (place / "fd").iterdir())):
                found.append(int(place.name))
        except OSError:  # It has ended.
            continue
    return found


# Loopback addresses as the tables of /proc have them: of IPv4, and the same as one of IPv6.
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}


def processes_in(folder: Path) -> list[int]:
    """Those of the Ray cluster that has its files in the folder, and this one."""
    found = [os.getpid()]
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command = (place / "cmdline").read_bytes()
            if str(folder).encode() in command or (
                command.startswith(b"ray::")
                and any(os.readlink(link).startswith(str(folder)) for link in (place / "fd").iterdir())
            ):
                found.append(int(place.name))
        except OSError:  # It has ended, or closed the file.
            continue
    return found


def listening(processes: Iterable[int]) -> dict[int, list[str]]:
    """The addresses, in hexadecimal, on which the processes listen, one for each socket."""
    tables = ("/proc/net/tcp", "/proc/net/tcp6")
    lines = [line.split() for table in tables for line in Path(table).read_text().splitlines()[1:]]
    addresses = {line[9]: line[1].partition(":")[0] for line in lines if line[3] == "0A"}
    found = dict[int, list[str]]()
    for process in processes:
        for link in Path(f"/proc/{process}/fd").glob("*"):
            try:
                sockets = re.findall(r"socket:\[(\d+)\]", os.readlink(link))
            except OSError:  # It has been closed.
                continue
            found.setdefault(process, []).extend(addresses[one] for one in sockets if one in addresses)
    return found


@contextmanager
def held(processes: Iterable[int]) -> Iterator[None]:
    """Stop them: a quick machine would end a run before what happens to it is seen."""
    stopped = list(processes)
    for one in stopped:
        os.kill(one, signal.SIGSTOP)
    try:
        yield
    finally:
        for one in stopped:
            os.kill(one, signal.SIGCONT)
