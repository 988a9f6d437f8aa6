"""Whether a cluster can train: every check, as a table."""

import sys

from rich.console import Console

from cluster.doctor.findings import print_findings
from cluster.ray_cluster import address, cluster


def run_doctor(
    storage: str | None = None,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    wait_for_nodes: float = 0.0,
) -> int:
    """Check the cluster that commands use here, or this machine; how many faults would stop a run.

    `storage` is a URI that every node must reach; `workers` how many to start, unset: as many as fit. A
    cluster that grows by itself is given `wait_for_nodes` seconds to do so. Raises ValueError where the
    cluster does not answer.
    """
    there = address()
    with cluster(cpus=2), Console(stderr=True).status("asking the nodes ..."):
        # Both import Ray, which reads its environment as it is imported.
        from cluster.doctor.node_checks import check_nodes
        from cluster.doctor.worker_checks import check_workers, have_nodes_come

        if wait_for_nodes:
            have_nodes_come(workers, gpus_per_worker, wait_for_nodes)
        findings = [*check_nodes(storage), *check_workers(workers, gpus_per_worker)]
    print(f"cluster at {there}" if there else "no cluster is running: this machine alone")
    print_findings(findings)
    if faults := sum(one.level == "fault" for one in findings):
        print(f"diptych: {faults} of {len(findings)} checks failed", file=sys.stderr)
    else:
        print("this cluster can train")
    return faults
