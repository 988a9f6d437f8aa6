"""The nodes of a running Ray cluster as a table."""

from rich.console import Console
from rich.table import Table

from cluster.local import address, cluster


def print_nodes() -> bool:
    """Print them; whether there is a cluster."""
    there = address()
    if there is None:
        return False
    with cluster(cpus=0):
        import ray

        table = Table(title=f"cluster at {there}", title_justify="left", box=None)
        for heading in ("node", "address", "state", "CPUs", "GPUs", "memory, GB"):
            table.add_column(
                heading, justify="right" if heading in ("CPUs", "GPUs", "memory, GB") else "left"
            )
        for node in sorted(ray.nodes(), key=lambda node: (not node["Alive"], node["NodeID"])):
            resources = node["Resources"]
            table.add_row(
                node["NodeID"][:8], node["NodeManagerAddress"], "alive" if node["Alive"] else "dead",
                f"{resources.get('CPU', 0):g}", f"{resources.get('GPU', 0):g}",
                f"{resources.get('memory', 0) / 1e9:.1f}",
            )  # fmt: skip
    Console().print(table)
    return True
