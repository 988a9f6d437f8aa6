"""The `diptych submit` and `diptych jobs` commands."""

import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from cluster.cli.app import app
from pipelines.storage.filesystems import check_no_secret, check_shared
from training.config import TrainConfig

if TYPE_CHECKING:
    from cluster.jobs import Jobs

Address = Annotated[str | None, Parameter(help="The cluster's address, as for `diptych submit`.")]

_NOT_AS_JOBS = ("submit", "jobs", "cluster")

jobs = App(name="jobs", help="List, show, follow and stop jobs that `diptych submit` sent to a cluster.")


def submit(
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    address: str | None = None,
    detach: bool = False,
    dry_run: bool = False,
) -> None:
    """Run a diptych command as a job of a Ray cluster and follow its log; the exit code is the job's.

    Example: diptych submit -- train config.toml --data.train s3://bucket/images --output s3://bucket/runs

    Parameters
    ----------
    command
        A command and its flags, after --. Paths must be object storage, or folders that all nodes of the
        cluster share. TOML files are sent, and diptych's code if the cluster does not have the same.
    address
        URL of the cluster's dashboard, such as http://HOST:8265, or its address as in RAY_ADDRESS; unset:
        RAY_ADDRESS, or the cluster that `diptych cluster up` started.
    detach
        Print the job's ID and do not follow the log.
    dry_run
        Print what would be sent and installed, but send no job.
    """
    from cluster.jobs import Jobs
    from cluster.staging import requirements, stage
    from cluster.tables import print_staged

    check_command(command)
    there = Jobs(address)
    job = stage(command, there.probe(requirements(command)))
    if dry_run:
        print_staged(job, there.address)
        return
    identity = there.submit(job)
    if detach:
        print(identity)
        return
    print(f"job {identity}: {job.why}", file=sys.stderr)
    _follow(there, identity)


@jobs.command(name="list")
def list_jobs(*, address: Address = None) -> None:
    """List the jobs, newest first."""
    from cluster.jobs import Jobs
    from cluster.tables import print_jobs

    print_jobs(Jobs(address).all())


@jobs.command
def show(job: str, /, *, address: Address = None) -> None:
    """Print the details of a job.

    Parameters
    ----------
    job
        Its ID.
    """
    from cluster.jobs import Jobs
    from cluster.tables import print_job

    print_job(Jobs(address).info(job))


@jobs.command
def logs(job: str, /, *, follow: bool = False, address: Address = None) -> None:
    """Print the log of a job.

    Parameters
    ----------
    job
        Its ID.
    follow
        Follow the log until the job ends; the exit code is the job's.
    """
    from cluster.jobs import Jobs

    there = Jobs(address)
    if follow:
        _follow(there, job)
    else:
        print(there.log(job), end="")


@jobs.command
def stop(job: str, /, *, address: Address = None) -> None:
    """Have a job save and end, and wait for it.

    Parameters
    ----------
    job
        Its ID.
    """
    from cluster.jobs import Jobs

    print(f"{job}: {Jobs(address).stop(job).lower()}")


def _follow(there: "Jobs", job: str) -> None:
    try:
        code = there.follow(job)
    except KeyboardInterrupt:
        print(
            f"\ndiptych: the job continues; follow it with: diptych jobs logs --follow {job}, stop it with: "
            f"diptych jobs stop {job}",
            file=sys.stderr,
        )
        sys.exit(130)
    if code:
        sys.exit(code)


def check_command(command: tuple[str, ...]) -> None:
    """Raise the error that a command would raise, as far as this machine can tell, before it is sent."""
    if not command or command[0] in _NOT_AS_JOBS:
        what = command[0] if command else "nothing"
        raise ValueError(f"{what} cannot be submitted; write: diptych submit -- train CONFIG --flags")
    for word in command:
        check_no_secret(word.partition("=")[2] if word.startswith("-") else word)
    if any(word.startswith("--resume") for word in command):
        return  # Perhaps only the cluster can read the run's config.
    bound = app.parse_args(command, print_error=False, exit_on_error=False)[1]
    config = bound.arguments.get("run")
    if isinstance(config, TrainConfig):
        places = {"data.train": config.data.train, "data.test": config.data.test, "output": config.output}
        for key, place in places.items():
            if place is not None:
                check_shared(place, f"--{key} {place}")
