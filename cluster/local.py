"""The Ray cluster that a command runs on: the one RAY_ADDRESS names, or a private one on this machine."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

# Ray ends processes that were idle for a second where there are more than cores. The readers are, between
# two windows, and starting one takes as long as it reads some thousand images.
PRIVATE_SYSTEM_CONFIG = {"num_workers_soft_limit": 64}


@contextmanager
def cluster(cpus: float) -> Iterator[None]:
    """Connect to the cluster, or start one with at least `cpus` logical CPUs; leave or end it afterwards.

    Logical CPUs only limit how many processes run at once: with more of them than cores, all are slower.
    """
    if ray.is_initialized():
        yield
        return
    # Threads that wait for work must not spin: torch's, DALI's and the readers' share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    workers = {"env_vars": {"OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"]}}
    settings = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(runtime_env=workers, **settings)
    else:
        # The dashboard would take a share of a small machine's cores.
        cores = max(os.cpu_count() or 1, int(cpus + 0.999))
        ray.init(num_cpus=cores, include_dashboard=False, _system_config=PRIVATE_SYSTEM_CONFIG, **settings)
    try:
        yield
    finally:
        ray.shutdown()
