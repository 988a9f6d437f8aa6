"""The Ray cluster that a command runs on: the one RAY_ADDRESS names, or one on this machine."""

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

# What a Ray address is unless it is one for Ray's own client.
_HOST_AND_PORT = re.compile(r"[^/]+:\d+")

# What RAY_ADDRESS may be instead: the cluster of this machine, or none.
_AUTO, _LOCAL = "auto", "local"

# What Ray takes for its own node's address.
_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")

_CONNECT_SECONDS = 10.0

# Threads that wait for processes of a lost cluster hear of their end within so long.
_ENDING_SECONDS = 1.0

# Where the cluster that this process has started has its files, while it is connected to that.
_own: str | None = None


def address() -> str | None:
    """Of the cluster that RAY_ADDRESS names, or that `diptych cluster up` has started; None without one.

    RAY_ADDRESS=auto is the latter, or else the one that `ray start` has noted; ValueError where there is
    neither. RAY_ADDRESS=local is none.
    """
    named = os.environ.get("RAY_ADDRESS")
    if named == _LOCAL:
        return None
    if named and named != _AUTO:
        return named
    if running := local_cluster.find():
        return running.address
    return _noted_by_ray() if named else None


@contextmanager
def cluster(cpus: float, modules: Sequence[Path] = (), resume: Sequence[str] = ()) -> Iterator[None]:
    """Connect to the cluster, or start one with at least `cpus` logical CPUs; leave or end it afterwards.

    Where the cluster is lost, or this process ends without a word, the user is told to `resume` by these
    arguments of the command; a ClusterLostError from within the block names them.

    Its workers can import `modules`, files or packages, too, unless this process is connected already.
    Logical CPUs only limit how many processes run at once: with more of them than cores, all are slower.
    """
    import ray

    if ray.is_initialized():
        with _left_once_lost(resume):
            yield
        return
    # Threads that wait for work must not spin: torch's, DALI's and the readers' share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    environment: dict[str, Any] = {"py_modules": [str(path) for path in modules]} if modules else {}
    there = address()
    # As Ray has it for clusters of one's own: with the token, unless someone has said otherwise.
    if not there and os.environ.get("RAY_AUTH_MODE", "token").lower() == "token":
        ensure_token()
    with ExitStack() as stack:
        folder = None if there else stack.enter_context(ray_folder())
        # Before Ray: where this process cannot be started, nothing is left connected.
        stack.enter_context(watched(resume, folder, os.path.dirname(ray.__file__)))
        if folder is None:
            _connect(there or "", environment, settings)
        else:
            # The dashboard would take a share of a small machine's cores.
            cores = max(os.cpu_count() or 1, int(cpus + 0.999))
            os.environ |= IDLE_STAY
            with checked_start(), files_in(folder):
                ray.init(
                    "local", num_cpus=cores, include_dashboard=False, runtime_env=environment, **settings
                )
        with _left(resume, folder), nullcontext() if there else watched_room(_warn):
            yield


@contextmanager
def _left(resume: Sequence[str], folder: str | None) -> Iterator[None]:
    """Leave or end the connected cluster after the block; `folder` has the files of one's own."""
    global _own
    import ray

    _own = folder
    with ExitStack() as leaving:
        leaving.callback(ray.shutdown)
        try:
            with _left_once_lost(resume):
                yield
        except ClusterLostError:
            leaving.pop_all()  # It was left, or cannot be.
            raise
        except KeyboardInterrupt:
            # A second Ctrl-C: threads still wait for Ray, and to leave it would end this process by them.
            leaving.pop_all()
            _end_own()
            raise
        finally:
            _own = None


@contextmanager
def _left_once_lost(resume: Sequence[str]) -> Iterator[None]:
    """Once the connected cluster is lost, end what is left of one's own, so that the next call has another.

    A ClusterLostError names the way to resume.
    """
    try:
        yield
    except ClusterLostError as lost:
        told = ClusterLostError(resume or lost.resume, told=True)
        if not lost.told:
            # At once: Ray may still end this process, and after this block no watchdog would say it.
            print(f"diptych: {told}", file=sys.stderr, flush=True)
        # Ray cannot leave one elsewhere whose processes still run: by its threads that wait for them it would
        # end this process.
        _end_own()
        raise told from lost


def _end_own() -> None:
    """End the cluster that this process has started, if any, and leave it."""
    import ray

    if _own:
        end_cluster(_own, os.path.dirname(ray.__file__))
        time.sleep(_ENDING_SECONDS)
        ray.shutdown()


def _connect(there: str, environment: dict[str, Any], settings: dict[str, Any]) -> None:
    """Connect to the cluster at this address; ValueError where that does not work."""
    import ray
    from ray.exceptions import AuthenticationError

    if there.startswith("http"):
        raise ValueError(f"{there} takes jobs alone; submit it: diptych submit --address {there} -- ...")
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
    """Of the cluster that `ray start` has started or joined here.

    Ray itself would take any that runs on this machine, also one that another process has for itself; so it
    does where it has no such function any more.
    """
    try:
        from ray._private.utils import read_ray_address
    except ImportError:
        return _AUTO
    if noted := read_ray_address():
        return noted
    raise ValueError(
        "RAY_ADDRESS=auto finds no Ray cluster here; start one with diptych cluster up, or leave it out to "
        "run on this machine"
    )


def _check_listens(there: str) -> None:
    """ValueError where no Ray cluster can be at that address: Ray would wait for minutes."""
    if there.startswith("ray://"):
        listens = local_cluster.answers(there.removeprefix("ray://"), _CONNECT_SECONDS)
    elif "://" in there or there == _AUTO:
        return  # Ray's own to find.
    elif not _HOST_AND_PORT.fullmatch(there):
        raise ValueError(f"RAY_ADDRESS={there} is no address of a Ray cluster; write HOST:6379")
    else:
        listens = local_cluster.answers(there, _CONNECT_SECONDS) and _speaks_grpc(_as_ray_takes_it(there))
    if not listens:
        raise ValueError(_no_answer(there))


def _as_ray_takes_it(there: str) -> str:
    """The address with this node's own in place of the loopback one."""
    from ray.util import get_node_ip_address

    host, _, port = there.rpartition(":")
    if host not in _LOOPBACK_HOSTS:
        return there
    own = get_node_ip_address()
    return f"[{own}]:{port}" if ":" in own else f"{own}:{port}"


def _speaks_grpc(there: str) -> bool:
    """Whether what listens there is a server of the kind that Ray's is."""
    import grpc

    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return True  # It would hang up on whoever has no certificate.
    channel = grpc.insecure_channel(there, options=[("grpc.enable_http_proxy", 0)])
    with channel, suppress(grpc.FutureTimeoutError):
        grpc.channel_ready_future(channel).result(_CONNECT_SECONDS)
        return True
    return False


def _other_versions(there: str, error: RuntimeError) -> str:
    """Ray's five lines about versions that differ, as one."""
    ray, python, our_ray, our_python = re.findall(r"(?:Ray|Python): (\S+)", str(error))
    return (
        f"the Ray cluster at {there} has Ray {ray} and Python {python}, this process Ray {our_ray} and "
        f"Python {our_python}; give both the same, or send a job: diptych submit --address http://HOST:8265 "
        "-- ..."
    )


def _no_answer(there: str, error: BaseException | None = None) -> str:
    if error and "AuthenticationError" in f"{type(error).__name__} {error.__cause__ or error.__context__}":
        return wants_token(there)
    return f"no Ray cluster answers at {there}; see RAY_ADDRESS, or leave it out to run on this machine"


def _before_ray_is_imported() -> None:
    os.environ.update(AT_IMPORT | os.environ)
    named, running = os.environ.get("RAY_ADDRESS"), local_cluster.find()
    if running and named in (None, "", _AUTO, running.address):
        os.environ.update(running.environment)
    elif not named or named == _LOCAL:
        os.environ.update(LOOPBACK_ONLY)


_before_ray_is_imported()
