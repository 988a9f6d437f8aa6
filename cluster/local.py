"""The Ray cluster that a command runs on: the one RAY_ADDRESS names, or one on this machine."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster import embedded
from cluster.ray_settings import LOOPBACK_ONLY, SYSTEM_CONFIG


def address() -> str | None:
    """Of the cluster that RAY_ADDRESS names, or that `diptych cluster up` has started; None without one."""
    if named := os.environ.get("RAY_ADDRESS"):
        return named
    running = embedded.find()
    return running.address if running else None


@contextmanager
def cluster(cpus: float) -> Iterator[None]:
    """Connect to the cluster, or start one with at least `cpus` logical CPUs; leave or end it afterwards.

    Logical CPUs only limit how many processes run at once: with more of them than cores, all are slower.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    # Threads that wait for work must not spin: torch's, DALI's and the readers' share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if there := address():
        workers = {"env_vars": {"OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"]}}
        try:
            ray.init(there, runtime_env=workers, **settings)
        except ConnectionError as error:
            raise ValueError(_no_answer(there, error)) from error
    else:
        # The dashboard would take a share of a small machine's cores.
        cores = max(os.cpu_count() or 1, int(cpus + 0.999))
        ray.init("local", num_cpus=cores, include_dashboard=False, _system_config=SYSTEM_CONFIG, **settings)
    try:
        yield
    finally:
        ray.shutdown()


def _no_answer(there: str, error: BaseException) -> str:
    if "AuthenticationError" in str(error.__cause__ or error.__context__):
        return (
            f"the Ray cluster at {there} wants its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH "
            "unless it is in ~/.ray/auth_token"
        )
    return f"no Ray cluster answers at {there}; see RAY_ADDRESS, or leave it out to run on this machine"


def _before_ray_is_imported() -> None:
    named, running = os.environ.get("RAY_ADDRESS"), embedded.find()
    if running and (named or running.address) == running.address:
        os.environ.update(running.environment)
    elif not named:
        os.environ.update(LOOPBACK_ONLY)


_before_ray_is_imported()
