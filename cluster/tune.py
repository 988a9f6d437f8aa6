"""A search from its TOML file to its best config, as the command runs it."""

import dataclasses
import json
import tomllib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tomli_w
from tqdm import tqdm

from cluster.config_file import read_toml
from cluster.local import cluster
from cluster.train import training_index, with_absolute_paths
from pipelines import storage
from training.config import TrainConfig, most_workers
from training.metrics import read_metrics
from training.record import read_config, to_toml, to_values
from tuning.compound import scoring
from tuning.space import SearchConfig

_FILE, _TRIALS = "search.toml", "trials.jsonl"


def read_search(path: Path, flags: dict[str, Any]) -> SearchConfig:
    """The search that a TOML file describes; flags take precedence. ValueError if it is none."""
    if not path.is_file():
        raise ValueError(f"no search {str(path)!r}: there is no such file")
    return SearchConfig(**read_toml(path) | flags)


def kept_search(run: str) -> SearchConfig:
    """The search that OUTPUT/NAME is; ValueError where it is none."""
    run = storage.absolute(run.rstrip("/"))
    content = storage.read(storage.join(run, _FILE))
    if content is None:
        raise ValueError(f"{run} is no search: there is no {_FILE}; give OUTPUT/NAME of one")
    output, _, name = run.rpartition("/")
    values: dict[str, Any] = tomllib.loads(content.decode()) | {"output": output, "name": name}
    return SearchConfig(**values)


def _keep(search: SearchConfig, folder: str) -> None:
    fields = {field.name: getattr(search, field.name) for field in dataclasses.fields(search)}
    content = tomli_w.dumps(fields | {"train": to_values(search.train)})
    try:
        storage.write(storage.join(folder, _FILE), content.encode())
    except OSError as error:
        raise ValueError(
            f"cannot write {folder}: {storage.first_line(error)}; choose another --output"
        ) from error


def _trials(search: SearchConfig) -> list[dict[str, Any]]:
    """What each trial that has begun has come to, best first."""
    folder = storage.join(search.output, search.name, "trials")
    if not storage.exists(folder):
        return []
    searched = list(search.distributions)
    if search.compound:
        searched += ["encoder.alpha", "encoder.beta", "encoder.gamma"]
    score, found = scoring(search), []
    for info in storage.listing(folder):
        path, _, name = info.path.rpartition("/")
        if name != "config.toml":
            continue
        run = storage.join(folder, path.rpartition("/")[2])
        config, lines = read_config(run), read_metrics(run)
        judged = [line for line in lines if "knn_top1" in line]
        found.append(
            {
                "run": run,
                "values": {key: _value(asdict(config), key) for key in searched},
                "images": (lines[-1]["step"] if lines else 0) * config.batch_size,
                "knn_top1": judged[-1]["knn_top1"] if judged else None,
                "score": score(config, judged[-1]["knn_top1"]) if judged else 0.0,
            }
        )
    return sorted(found, key=lambda trial: -trial["score"])


def _value(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _config_of(trial: dict[str, Any], search: SearchConfig) -> TrainConfig:
    """What `diptych train` would take to do the trial again."""
    return replace(read_config(trial["run"]), name=f"{search.name}-best", output=search.train.output)


def print_status(run: str) -> None:
    """The trials of a search; ValueError where it is none."""
    search = kept_search(run)
    trials = _trials(search)
    for trial in trials:
        accuracy = "      -" if trial["knn_top1"] is None else f"{trial['knn_top1']:7.1%}"
        print(f"{accuracy}  {trial['images']:>10,} images  {_shown(trial['values'])}  {trial['run']}")
    print(f"{len(trials)} of {search.count} trials have begun")


def write_best(run: str, dest: str) -> None:
    """The config of the best trial, to `dest`; ValueError where there is none, or it cannot be written."""
    search = kept_search(run)
    ranked = storage.read(storage.join(search.output, search.name, _TRIALS))
    # What has ended is ranked by the search itself.
    trials = [json.loads(line) for line in ranked.decode().splitlines()] if ranked else _trials(search)
    if not trials or trials[0]["knn_top1"] is None:
        raise ValueError(f"{run} has no trial that was judged yet; see diptych tune status {run}")
    best = _config_of(trials[0], search)
    try:
        storage.write(dest, to_toml(best).encode())
    except OSError as error:
        raise ValueError(f"cannot write {dest}: {storage.first_line(error)}; choose another file") from error
    print(f"{dest}: kNN accuracy {trials[0]['knn_top1']:.1%}, {_shown(trials[0]['values'])}")


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
    _keep(search, folder)
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
    storage.write(f"{folder}/{_TRIALS}", "".join(json.dumps(trial) + "\n" for trial in trials).encode())
    best = _config_of(trials[0], search)
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
