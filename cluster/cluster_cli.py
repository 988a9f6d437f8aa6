"""The `diptych cluster` commands."""

import sys

from cyclopts import App

from cluster.data_cli import Count
from cluster.ray_settings import LOOPBACK

cluster = App(
    name="cluster",
    help="A Ray cluster on this machine, for trying things: commands without RAY_ADDRESS use it.",
)


@cluster.command
def up(*, nodes: Count = 1, cpus: Count = 8, host: str = LOOPBACK) -> None:
    """Start a Ray cluster on this machine; it stays until `diptych cluster down`.

    Parameters
    ----------
    nodes
        Ray nodes, each with processes and ports of its own.
    cpus
        Logical CPUs of each: how much runs on it at once. They may be more than the machine has cores.
    host
        The address that it listens on. Beyond this machine it is reached only with another one than the
        loopback address, and with Ray's token, which is in ~/.ray/auth_token.
    """
    from cluster.embedded import up

    started = up(nodes, cpus, host)
    print(f"{nodes} x {cpus} CPUs at {started.address}, dashboard {started.dashboard}")
    print("diptych on this machine uses it; it ends with: diptych cluster down")


@cluster.command
def status() -> None:
    """Print the nodes of the cluster that commands use here; without one the exit code is 1."""
    from cluster.nodes import print_nodes

    if not print_nodes():
        sys.exit("diptych: no cluster is running; start one with: diptych cluster up")


@cluster.command
def down() -> None:
    """End the cluster that `up` has started, also after a crash; nothing else is touched."""
    from cluster.embedded import down

    print(f"{down()} processes ended")
