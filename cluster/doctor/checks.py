"""Run all checks of a cluster and print them as a table."""

import sys

from rich.console import Console

from cluster.doctor.check_results import print_results
from cluster.ray_cluster import address, cluster


def run_doctor(
    storage: str | None = None,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    wait_for_nodes: float = 0.0,
) -> int:
    """Check the cluster that commands use here, or this machine; returns the number of errors.

    `storage` is a URI that every node must reach. `workers` is the number of workers to start; unset: as
    many as fit. With `wait_for_nodes`, first request nodes from the autoscaler and wait that many seconds for
    them. Raises ValueError if the cluster does not answer.
    """
    there = address()
    with cluster(cpus=2), Console(stderr=True).status("asking the nodes ..."):
        # Both import Ray, which reads its environment as it is imported.
        from cluster.doctor.node_checks import check_nodes
        from cluster.doctor.worker_checks import check_workers, request_nodes

        if wait_for_nodes:
            request_nodes(workers, gpus_per_worker, wait_for_nodes)
        results = [*check_nodes(storage), *check_workers(workers, gpus_per_worker)]
    print(f"cluster at {there}" if there else "no cluster is running: this machine alone")
    print_results(results)
    if errors := sum(result.level == "error" for result in results):
        print(f"diptych: {errors} of {len(results)} checks failed", file=sys.stderr)
    else:
        print("this cluster can train")
    return errors
