"""The `diptych cluster` commands."""

import shlex
import sys
from typing import Annotated

from cyclopts import App, Parameter

from cluster.cli.data_commands import Count
from cluster.cli.jobs_commands import check_command
from cluster.manifest import Kind, ManifestSettings
from cluster.ray_folder import LOOPBACK

cluster = App(
    name="cluster",
    help="Start a Ray cluster on this machine, which commands without RAY_ADDRESS use, or write the manifest "
    "of another.",
)


@cluster.command
def up(*, nodes: Count = 1, cpus: Count = 8, host: str = LOOPBACK) -> None:
    """Start a Ray cluster on this machine; it runs until `diptych cluster down`.

    Parameters
    ----------
    nodes
        Number of Ray nodes, each with its own processes and ports.
    cpus
        Logical CPUs of each node, which limit how much runs at once; may exceed the machine's cores.
    host
        Address that it listens on. Other machines can reach it only if this is not the loopback address, and
        with Ray's token from ~/.ray/auth_token.
    """
    from cluster.local_cluster import up

    started = up(nodes, cpus, host)
    print(f"{nodes} x {cpus} CPUs at {started.address}, dashboard {started.dashboard}")
    print("diptych on this machine uses it; end it with: diptych cluster down")


@cluster.command
def status() -> None:
    """Print the nodes of the cluster that commands use here; exit code 1 if there is none."""
    from cluster.tables import print_nodes

    if not print_nodes():
        sys.exit("diptych: no cluster is running; start one with: diptych cluster up")


@cluster.command
def down() -> None:
    """End the cluster that `up` started, also after a crash, and nothing else."""
    from cluster.local_cluster import down

    print(f"{down()} processes ended")


@cluster.command
def manifest(
    kind: Kind,
    /,
    *,
    output: Annotated[str | None, Parameter(alias="-o")] = None,
    settings: Annotated[ManifestSettings, Parameter(name="*")] = ManifestSettings(),  # noqa: B008
) -> None:
    """Write a manifest of a Ray cluster with GPU nodes; it contains no credentials.

    Parameters
    ----------
    kind
        kuberay: a RayCluster or RayJob, for kubectl. aws, gcp: a file for `ray up`. docs/kuberay.md, aws.md
        and gcp.md describe the steps before and after.
    output
        The file to write: a path, file://, s3://, gs:// or az://; unset: standard output.
    """
    from cluster.manifest import render
    from pipelines import storage

    text = render(kind, settings)
    if settings.job is not None:
        check_command(tuple(shlex.split(settings.job)))
    if output is None:
        print(text, end="")
    else:
        try:
            storage.write(output, text.encode())
        except OSError as error:
            why = storage.first_line(error)
            raise ValueError(f"cannot write {output}: {why}; choose another place") from error
        print(f"{output}; next: {'kubectl apply -f' if kind == 'kuberay' else 'ray up'} {output}")
