"""The `diptych cluster` commands."""

import shlex
import sys
from typing import Annotated

from cyclopts import App, Parameter

from cluster.cli.data_commands import Count
from cluster.cli.jobs_commands import check_command
from cluster.manifest import Kind, Wishes
from cluster.ray_folder import LOOPBACK

cluster = App(
    name="cluster",
    help="Ray clusters: one on this machine, for trying things, which commands without RAY_ADDRESS use; and "
    "manifests for others.",
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
    from cluster.local_cluster import up

    started = up(nodes, cpus, host)
    print(f"{nodes} x {cpus} CPUs at {started.address}, dashboard {started.dashboard}")
    print("diptych on this machine uses it; it ends with: diptych cluster down")


@cluster.command
def status() -> None:
    """Print the nodes of the cluster that commands use here; without one the exit code is 1."""
    from cluster.tables import print_nodes

    if not print_nodes():
        sys.exit("diptych: no cluster is running; start one with: diptych cluster up")


@cluster.command
def down() -> None:
    """End the cluster that `up` has started, also after a crash; nothing else is touched."""
    from cluster.local_cluster import down

    print(f"{down()} processes ended")


@cluster.command
def manifest(
    kind: Kind,
    /,
    *,
    output: Annotated[str | None, Parameter(alias="-o")] = None,
    wishes: Annotated[Wishes, Parameter(name="*")] = Wishes(),  # noqa: B008
) -> None:
    """Write what a Ray cluster with GPU nodes is made from: a file that holds no credentials.

    Parameters
    ----------
    kind
        kuberay: a RayCluster or RayJob, for kubectl. aws, gcp: a file for `ray up`. docs/kuberay.md, aws.md
        and gcp.md tell what comes before and after.
    output
        The file to write: a path, file://, s3://, gs:// or az://; unset: standard output.
    """
    from cluster.manifest import render
    from pipelines import storage

    text = render(kind, wishes)
    if wishes.job is not None:
        check_command(tuple(shlex.split(wishes.job)))
    if output is None:
        print(text, end="")
    else:
        try:
            storage.write(output, text.encode())
        except OSError as error:
            why = storage.first_line(error)
            raise ValueError(f"cannot write {output}: {why}; choose another place") from error
        print(f"{output}; next: {'kubectl apply -f' if kind == 'kuberay' else 'ray up'} {output}")
