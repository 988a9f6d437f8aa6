"""The `diptych tune` commands."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

tune = App(
    name="tune",
    help="Search for the values of any keys of a training config; best.toml then goes to `diptych train`.",
)


@tune.default
def search(
    search: Path,
    /,
    *,
    data: str | None = None,
    trials: int | None = None,
    max_minutes: float | None = None,
    concurrent: int | None = None,
    workers: int | None = None,
    searcher: str | None = None,
    scheduler: str | None = None,
    metric: str | None = None,
    seed: int | None = None,
    name: str | None = None,
    output: str | None = None,
) -> None:
    """Search; interrupted, the same command or `diptych tune resume` goes on.

    Parameters
    ----------
    search
        A search that comes with diptych, such as simclr, or a TOML file with the tables `train` (a training
        config) and `space` (distributions of its keys). Flags take precedence over it.
    data
        Images to train on: train.data.train.
    trials
        How many combinations are tried.
    max_minutes
        End the search after so many minutes; `diptych tune resume` goes on.
    concurrent
        Trials that run at a time.
    workers
        Workers of each trial: train.workers.
    searcher
        random, grid or tpe.
    scheduler
        asha, hyperband, population or none.
    metric
        Accuracy by which trials are ranked: knn or linear.
    seed
        Seed of the combinations.
    name
        The search's name; it is written to OUTPUT/NAME.
    output
        Where searches are written: a path, file://, s3://, gs:// or az://.
    """
    # torch takes seconds to import; help should not.
    from cluster.tune import read_search, run_tuning

    flags = {
        "train.data.train": data,
        "trials": trials,
        "max_minutes": max_minutes,
        "concurrent": concurrent,
        "train.workers": workers,
        "searcher": searcher,
        "scheduler": scheduler,
        "metric": metric,
        "seed": seed,
        "name": name,
        "output": output,
    }
    run_tuning(read_search(search, {key: value for key, value in flags.items() if value is not None}))


@tune.command
def resume(run: str, /) -> None:
    """Go on with a search: its finished trials stay, the others go on from their checkpoints.

    Parameters
    ----------
    run
        OUTPUT/NAME of the search: a path, file://, s3://, gs:// or az://.
    """
    from cluster.tune import kept_search, run_tuning

    run_tuning(kept_search(run))


@tune.command
def status(run: str, /) -> None:
    """Print the trials of a search, running or not, best first.

    Parameters
    ----------
    run
        OUTPUT/NAME of the search: a path, file://, s3://, gs:// or az://.
    """
    from cluster.tune import print_status

    print_status(run)


@tune.command
def best(run: str, /, *, output: Annotated[str, Parameter(alias="-o")] = "best.toml") -> None:
    """Write the config of the best trial so far, as `diptych train` takes it.

    Parameters
    ----------
    run
        OUTPUT/NAME of the search: a path, file://, s3://, gs:// or az://.
    output
        The file to write: likewise.
    """
    from cluster.tune import write_best

    write_best(run, output)
