"""The `diptych tune` commands."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

tune = App(
    name="tune",
    help="Search over any keys of a training config. `diptych train` takes the resulting best.toml.",
)


@dataclass(frozen=True, kw_only=True)
class SearchFlags:
    """Fields of a search that are also flags."""

    data: str | None = None
    """Images to train on: train.data.train."""
    trials: int | None = None
    """Number of trials."""
    max_minutes: float | None = None
    """End the search after this many minutes; `diptych tune resume` resumes it."""
    concurrent: int | None = None
    """Trials that run at the same time."""
    workers: int | None = None
    """Workers of each trial: train.workers."""
    searcher: str | None = None
    """random, grid or tpe."""
    scheduler: str | None = None
    """asha or none."""
    metric: str | None = None
    """Accuracy by which trials are ranked: knn or linear."""
    seed: int | None = None
    """Seed of the drawn values, and of which images are held out."""
    name: str | None = None
    """The search's name; its folder is OUTPUT/NAME."""
    output: str | None = None
    """Where searches are written: a path, file://, s3://, gs:// or az://."""

    def by_key(self) -> dict[str, Any]:
        """The flags that were given, by dotted key."""
        keys = {"data": "train.data.train", "workers": "train.workers"}
        return {keys.get(key, key): value for key, value in asdict(self).items() if value is not None}


@tune.default
def search(search: Path, /, *, flags: Annotated[SearchFlags, Parameter(name="*")] = SearchFlags()) -> None:
    """Run a search. After an interruption the same command, or `diptych tune resume`, resumes it.

    Parameters
    ----------
    search
        A search that comes with diptych, such as simclr, or a TOML file with the tables `train` (a training
        config) and `space` (distributions of its keys). Flags take precedence.
    """
    # torch takes seconds to import; help should not.
    from cluster.tune import read_search, run_tuning

    run_tuning(read_search(search, flags.by_key()))


@tune.command
def resume(run: str, /) -> None:
    """Resume a search: finished trials are kept, the others resume from their checkpoints.

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
    """Write the config of the best trial so far, for `diptych train`.

    Parameters
    ----------
    run
        OUTPUT/NAME of the search: a path, file://, s3://, gs:// or az://.
    output
        The file to write: a path, file://, s3://, gs:// or az://.
    """
    from cluster.tune import write_best

    write_best(run, output)
