"""A Ray cluster of several nodes on this machine, which runs until `diptych cluster down`."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.auth_token import ensure_token
from cluster.ray_folder import IDLE_STAY, LOOPBACK, LOOPBACK_ONLY, lasting_ray_folder, remove_ray_folder
from cluster.start_checks import check_start
from pipelines.storage.checksums import checked_json, json_with_checksum

# Set in the environment of each process of the cluster, so that `down` finds these and no others. Processes
# with a title, ray::..., overwrite it; they are found by their open files in the cluster's folder.
_MARK = "DIPTYCH_CLUSTER"

# A node starts within seconds; on a crowded machine it takes longer.
_START_SECONDS = 180.0

# Time for processes to end by themselves.
_GRACE_SECONDS = 5.0

_OBJECT_STORE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class LocalCluster:
    """The cluster that `diptych cluster up` started: its addresses, folder and process mark."""

    address: str
    dashboard: str
    mark: str
    folder: str

    @property
    def environment(self) -> dict[str, str]:
        """Variables that a process needs, before it imports Ray, to join this cluster or connect to it."""
        alone = LOOPBACK_ONLY if self.address.startswith(f"{LOOPBACK}:") else {}
        return {"RAY_AUTH_MODE": "token", **alone}


def up(nodes: int, cpus: int, host: str = LOOPBACK) -> LocalCluster:
    """Start a cluster of `nodes` Ray nodes with `cpus` logical CPUs each; it listens on `host` alone.

    Ray's token authentication is on, and no other user can enter the cluster's folder. Raises ValueError if
    a cluster is running already, `host` is not an address of this machine, the token or the folder cannot be
    made, or a node does not start; nothing is left running then.
    """
    if running := find():
        raise ValueError(f"a cluster is already running at {running.address}; diptych cluster down ends it")
    down()
    check_start()
    port, dashboard = _free_ports(host, 2)
    ensure_token()
    cluster = LocalCluster(
        f"{host}:{port}",
        f"http://{host}:{dashboard}",
        secrets.token_hex(8),
        lasting_ray_folder(),
    )
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        _write(_state(), json_with_checksum(asdict(cluster)))
    except OSError as error:
        remove_ray_folder(cluster.folder)
        raise ValueError(
            f"cannot write {_state()}: {error.strerror}; set XDG_STATE_HOME to a folder that you may write"
        ) from error
    log = _folder() / "cluster.log"
    # Threads that wait must not spin: all nodes share this machine's cores.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **IDLE_STAY, **os.environ, **cluster.environment}
    environment[_MARK] = cluster.mark
    environment.pop("RAY_ADDRESS", None)
    # Ray's Cluster writes its address to Ray's default folder, where other users' `ray.init()` would find it,
    # and which may belong to another user.
    environment["RAY_TMPDIR"] = str(Path(cluster.folder).parent)
    # Jobs run `python`; this makes it the interpreter that runs here.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    command = f"from cluster.local_cluster import LocalCluster, hold; hold({nodes}, {cpus}, {cluster!r})"
    with log.open("wb") as out:
        holder = subprocess.Popen(
            [sys.executable, "-c", command], env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=out, start_new_session=True,
        )  # fmt: skip
    try:
        _wait(holder, log)
    except BaseException:
        down()
        raise
    return cluster


def hold(nodes: int, cpus: int, cluster: LocalCluster) -> None:
    """Start the nodes, say so on stdout, and keep them until SIGTERM; `up` runs this in a process."""
    from ray.cluster_utils import Cluster

    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    host, _, port = cluster.address.rpartition(":")
    node = {
        "node_ip_address": host,
        "num_cpus": cpus,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "dashboard_agent_listen_port": 0,
    }
    head = {
        "num_gpus": visible_gpus(),
        "gcs_server_port": int(port),
        "include_dashboard": True,
        "dashboard_host": host,
        "dashboard_port": int(cluster.dashboard.rpartition(":")[2]),
        "temp_dir": cluster.folder,
    }
    started = Cluster(initialize_head=True, head_node_args=node | head)
    for number in range(1, nodes):
        # A folder for each node: in a shared one, unpacking a job's files would remove another node's.
        started.add_node(**node, runtime_env_dir_name=f"runtime_resources_{number}")
    os.write(1, b"up")
    while True:
        signal.pause()


def visible_gpus() -> int:
    """Number of this machine's GPUs. The head has all of them; other nodes would assign them twice."""
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0  # No driver.
    there, visible = len(listed.splitlines()), os.environ.get("CUDA_VISIBLE_DEVICES")
    return there if visible is None else min(there, len(list(filter(None, visible.split(",")))))


def find() -> LocalCluster | None:
    """The running cluster, or None."""
    cluster = _read()
    return cluster if cluster and answers(cluster.address) and any(_processes(cluster)) else None


def down() -> int:
    """End all processes of the cluster, also after a crash; returns how many there were."""
    cluster = _read()
    if cluster is None:
        return 0
    found = list(_processes(cluster))
    _signal(found, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    while left := list(_processes(cluster)):
        if time.monotonic() > deadline:
            _signal(left, signal.SIGKILL)
        time.sleep(0.1)
    _state().unlink()
    remove_ray_folder(cluster.folder)
    return len(found)


def _folder() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "diptych"


def _state() -> Path:
    return _folder() / "cluster.json"


def _read() -> LocalCluster | None:
    try:
        return LocalCluster(**checked_json(_state().read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{_state()} is damaged; delete it") from error


def _write(path: Path, content: str) -> None:
    beside = path.with_suffix(".part")
    beside.write_text(content)
    beside.replace(path)


def _wait(holder: subprocess.Popen, log: Path) -> None:
    assert holder.stdout
    os.set_blocking(holder.stdout.fileno(), False)
    deadline = time.monotonic() + _START_SECONDS
    while not holder.stdout.read():
        if holder.poll() is not None or time.monotonic() > deadline:
            raise ValueError(f"the cluster did not start; see {log}")
        time.sleep(0.1)
    holder.stdout.close()


def answers(address: str, seconds: float = 1.0) -> bool:
    """Whether something at HOST:PORT accepts a connection within `seconds`."""
    host, _, port = address.rpartition(":")
    with suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=seconds):
        return True
    return False


def _free_ports(host: str, count: int) -> list[int]:
    try:
        sockets = [socket.create_server((host, 0)) for _ in range(count)]
    except OSError as error:
        raise ValueError(f"host={host} is not this machine's address; leave it out, or give one") from error
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _processes(cluster: LocalCluster) -> Iterator[int]:
    """Processes with the cluster's mark in their environment, or with Ray's title and its files open."""
    wanted = f"{_MARK}={cluster.mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # It has ended, or belongs to another user.
            marked = wanted in (folder / "environ").read_bytes().split(b"\0")
            titled = (folder / "cmdline").read_bytes().startswith(b"ray")
            if marked or (
                titled and any(_within(cluster.folder, link) for link in (folder / "fd").iterdir())
            ):
                yield int(folder.name)


def _within(folder: str, link: Path) -> bool:
    with suppress(OSError):  # It has been closed.
        return os.readlink(link).startswith(f"{folder}/")
    return False


def _signal(processes: list[int], number: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)
