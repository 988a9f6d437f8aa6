"""Connect to the Ray cluster that RAY_ADDRESS names, or start one on this machine."""

import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from cluster import local_cluster
from cluster.auth_token import ensure_token
from cluster.ray_folder import AT_IMPORT, IDLE_STAY, LOOPBACK_ONLY, files_in, ray_folder, wants_token
from cluster.start_checks import checked_start, watched_room
from cluster.watchdog import end_cluster, watched
from training.errors import ClusterLostError

# A Ray address, unless it is for Ray Client.
_HOST_AND_PORT = re.compile(r"[^/]+:\d+")

# Other values of RAY_ADDRESS: this machine's cluster, or none.
_AUTO, _LOCAL = "auto", "local"

# Hosts that Ray replaces by its own node's address.
_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")

_CONNECT_SECONDS = 10.0

# Threads that wait for processes of a lost cluster notice their end within this time.
_ENDING_SECONDS = 1.0

# The folder of the cluster that this process has started, while connected to it.
_own: str | None = None


def address() -> str | None:
    """Address of the cluster that RAY_ADDRESS names, or that `diptych cluster up` started; None without one.

    RAY_ADDRESS=auto means the latter, or else the cluster that `ray start` started; raises ValueError if
    there is neither. RAY_ADDRESS=local means none.
    """
    named = os.environ.get("RAY_ADDRESS")
    if named == _LOCAL:
        return None
    if named and named != _AUTO:
        return named
    if running := local_cluster.find():
        return running.address
    return _noted_by_ray() if named else None


def place() -> str:
    """Where `cluster` runs things, in words: the cluster that it joins, or this machine."""
    ray: Any = sys.modules.get("ray")  # Importing it takes seconds.
    there = ray.get_runtime_context().gcs_address if ray and ray.is_initialized() else address()
    return f"on the Ray cluster at {there}" if there else "on this machine"


@contextmanager
def cluster(cpus: float, modules: Sequence[Path] = (), resume: Sequence[str] = ()) -> Iterator[None]:
    """Connect to the cluster, or start one with at least `cpus` logical CPUs; leave or end it afterwards.

    `resume` holds the arguments of the command that resumes the work. If the cluster is lost, or this process
    ends without an error, the user sees them; a ClusterLostError from the block names them.

    Workers can also import `modules` (files or packages), unless this process is connected already. Logical
    CPUs only limit how many processes run at once: with more of them than cores, all are slower.
    """
    import ray

    if ray.is_initialized():
        with _handle_loss(resume):
            yield
        return
    # Waiting threads must not spin: those of torch, DALI and the readers share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    environment: dict[str, Any] = {"py_modules": [str(path) for path in modules]} if modules else {}
    there = address()
    # As Ray does for clusters that it starts: require the token, unless the user set otherwise.
    if not there and os.environ.get("RAY_AUTH_MODE", "token").lower() == "token":
        ensure_token()
    with ExitStack() as stack:
        folder = None if there else stack.enter_context(ray_folder())
        # Before Ray, so that nothing stays connected if the watchdog cannot be started.
        stack.enter_context(watched(resume, folder, os.path.dirname(ray.__file__)))
        if folder is None:
            _connect(there or "", environment, settings)
        else:
            # No dashboard: it would take a share of a small machine's cores.
            cores = max(os.cpu_count() or 1, int(cpus + 0.999))
            os.environ |= IDLE_STAY
            with checked_start(), files_in(folder):
                ray.init(
                    "local", num_cpus=cores, include_dashboard=False, runtime_env=environment, **settings
                )
        with _connected(resume, folder), nullcontext() if there else watched_room(_warn):
            yield


@contextmanager
def _connected(resume: Sequence[str], folder: str | None) -> Iterator[None]:
    """Disconnect after the block; `folder` is that of a cluster that this process started, which ends."""
    global _own
    import ray

    _own = folder
    with ExitStack() as leaving:
        leaving.callback(ray.shutdown)
        try:
            with _handle_loss(resume):
                yield
        except ClusterLostError:
            leaving.pop_all()  # Already disconnected, or impossible.
            raise
        except KeyboardInterrupt:
            # A second Ctrl-C: threads still wait for Ray, and a shutdown would end this process.
            leaving.pop_all()
            _end_own()
            raise
        finally:
            _own = None


@contextmanager
def _handle_loss(resume: Sequence[str]) -> Iterator[None]:
    """If the cluster is lost, end what is left of one that this process started, so that the next call works.

    The ClusterLostError names the command to resume with.
    """
    try:
        yield
    except ClusterLostError as lost:
        reported = ClusterLostError(resume or lost.resume, told=True)
        if not lost.told:
            # At once, since Ray may still end this process, and the watchdog stops with this block.
            print(f"diptych: {reported}", file=sys.stderr, flush=True)
        # Only for a cluster of this process: Ray's threads wait for the processes of any other and would end
        # this process on a shutdown.
        _end_own()
        raise reported from lost


def _end_own() -> None:
    """End the cluster that this process started, if any, and disconnect."""
    import ray

    if _own:
        end_cluster(_own, os.path.dirname(ray.__file__))
        time.sleep(_ENDING_SECONDS)
        ray.shutdown()


def _connect(there: str, environment: dict[str, Any], settings: dict[str, Any]) -> None:
    """Connect to the cluster at the address `there`. Raises ValueError if that fails."""
    import ray
    from ray.exceptions import AuthenticationError

    if there.startswith("http"):
        raise ValueError(f"{there} takes only jobs; submit one: diptych submit --address {there} -- ...")
    _check_listens(there)
    environment = environment | {"env_vars": {"OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"]}}
    try:
        ray.init(there, runtime_env=environment, **settings)
    except (ConnectionError, AuthenticationError) as error:
        raise ValueError(_no_answer(there, error)) from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise ValueError(_other_versions(there, error)) from error


def _warn(message: str) -> None:
    from cluster.terminal import warn  # It imports torch.

    warn(message)


def _noted_by_ray() -> str:
    """Address of the cluster that `ray start` started or joined here.

    Ray itself would take any cluster of this machine, even another process's private one. It does so if it
    no longer has this function.
    """
    try:
        from ray._private.utils import read_ray_address
    except ImportError:
        return _AUTO
    if noted := read_ray_address():
        return noted
    raise ValueError(
        "RAY_ADDRESS=auto finds no Ray cluster here; start one with diptych cluster up, or unset it to run "
        "on this machine"
    )


def _check_listens(there: str) -> None:
    """Raise ValueError if no Ray cluster can be at the address; Ray would wait for minutes."""
    if there.startswith("ray://"):
        listens = local_cluster.answers(there.removeprefix("ray://"), _CONNECT_SECONDS)
    elif "://" in there or there == _AUTO:
        return  # Ray resolves these.
    elif not _HOST_AND_PORT.fullmatch(there):
        raise ValueError(f"RAY_ADDRESS={there} is not the address of a Ray cluster; write HOST:6379")
    else:
        listens = local_cluster.answers(there, _CONNECT_SECONDS) and _speaks_grpc(_as_ray_takes_it(there))
    if not listens:
        raise ValueError(_no_answer(there))


def _as_ray_takes_it(there: str) -> str:
    """The address, with this node's own host in place of a loopback one, as Ray replaces it."""
    from ray.util import get_node_ip_address

    host, _, port = there.rpartition(":")
    if host not in _LOOPBACK_HOSTS:
        return there
    own = get_node_ip_address()
    return f"[{own}]:{port}" if ":" in own else f"{own}:{port}"


def _speaks_grpc(there: str) -> bool:
    """Whether a gRPC server, as Ray's is, listens there."""
    import grpc

    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return True  # It closes connections without a certificate.
    channel = grpc.insecure_channel(there, options=[("grpc.enable_http_proxy", 0)])
    with channel, suppress(grpc.FutureTimeoutError):
        grpc.channel_ready_future(channel).result(_CONNECT_SECONDS)
        return True
    return False


def _other_versions(there: str, error: RuntimeError) -> str:
    """Ray's five lines about differing versions, as one."""
    ray, python, our_ray, our_python = re.findall(r"(?:Ray|Python): (\S+)", str(error))
    return (
        f"the Ray cluster at {there} has Ray {ray} and Python {python}, this process Ray {our_ray} and "
        f"Python {our_python}; use the same on both, or submit a job: diptych submit --address "
        "http://HOST:8265 -- ..."
    )


def _no_answer(there: str, error: BaseException | None = None) -> str:
    if error and "AuthenticationError" in f"{type(error).__name__} {error.__cause__ or error.__context__}":
        return wants_token(there)
    return f"no Ray cluster answers at {there}; check RAY_ADDRESS, or unset it to run on this machine"


def _before_ray_is_imported() -> None:
    os.environ.update(AT_IMPORT | os.environ)
    named, running = os.environ.get("RAY_ADDRESS"), local_cluster.find()
    if running and named in (None, "", _AUTO, running.address):
        os.environ.update(running.environment)
    elif not named or named == _LOCAL:
        os.environ.update(LOOPBACK_ONLY)


_before_ray_is_imported()
