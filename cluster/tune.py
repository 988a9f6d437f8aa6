"""A search from its TOML file to its best config, as the command runs it."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cluster.local import cluster
from cluster.train import training_index, with_absolute_paths
from pipelines import storage
from training.config import most_workers
from training.record import read_config, to_toml
from tuning.space import SearchConfig


def read_search(path: Path, flags: dict[str, Any]) -> SearchConfig:
    """The search that a TOML file describes; flags take precedence. ValueError if it is none."""
    if not path.is_file():
        raise ValueError(f"no search {str(path)!r}: there is no such file")
    try:
        values = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    return SearchConfig(**{"name": path.stem, **values, **flags})


def run_tuning(search: SearchConfig) -> list[dict[str, Any]]:
    """Run the search, showing each trial's accuracy; what OUTPUT/NAME/trials.jsonl gets, best first."""
    # Ray takes seconds to import; an error in the config should not.
    from training.worker import CPUS_PER_WORKER
    from tuning.search import CPUS_PER_TRIAL, METRIC, run_search

    search = replace(search, train=with_absolute_paths(search.train), output=storage.absolute(search.output))
    index = training_index(search.train)
    if not index.has_labels:
        raise ValueError(
            f"trials are ranked by labels: no column {search.train.data.label_column!r} in the images; "
            "name it with train.data.label_column"
        )
    folder = storage.join(search.output, search.name)
    cpus = search.concurrent * (most_workers(search.train) * CPUS_PER_WORKER + CPUS_PER_TRIAL)
    with cluster(cpus), tqdm(total=search.count, desc="trials", unit="trial") as bar:

        def show(values: dict[str, Any], result: dict[str, Any]) -> None:
            if result.get("done"):
                bar.update()
            if METRIC in result and result.get("images"):
                bar.write(f"{_shown(values)}: kNN {result[METRIC]:.1%} after {result['images']:,} images")

        trials = run_search(search, index, show)
    if not trials:
        raise ValueError(f"every trial failed; see error.log of the runs in {folder}/trials")
    storage.write(f"{folder}/trials.jsonl", "".join(json.dumps(trial) + "\n" for trial in trials).encode())
    best = replace(read_config(trials[0]["run"]), name=f"{search.name}-best", output=search.train.output)
    storage.write(f"{folder}/best.toml", to_toml(best).encode())
    for trial in trials:
        print(f"{trial[METRIC]:6.1%}  {trial['images']:>10,} images  {_shown(trial['values'])}")
    print(f"best: {folder}/best.toml")
    return trials


def _shown(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in values.items()
    )
