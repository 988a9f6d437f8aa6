"""Run a search, from its TOML file to its best config."""

import dataclasses
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from rich.console import Console

from cluster.config_file import read_toml
from cluster.ray_cluster import cluster
from cluster.signals import Interrupted, stop_signals
from cluster.tables import LiveTrials, described, trial_table
from cluster.terminal import counted, warn
from cluster.train import say_fit, training_index, with_absolute_paths
from pipelines import storage
from pipelines.index import Index
from pipelines.labels import with_labels
from training.config import TrainConfig, most_workers
from training.errors import RunError, UnsavedError
from training.evaluation.certainty import doubts, shown, shown_baselines
from training.initial import check_initial, find_initial, read_initial
from training.lease import Held, leased
from training.own_objective import own_modules
from training.run_folder import encode_toml, keep_index, kept_index, kept_toml, to_toml, to_values
from tuning.compound import scoring
from tuning.config import METRICS, SearchConfig
from tuning.report import write_search_report
from tuning.trial_config import best_config, check_surface, ranking_line, search_folder, trial_points
from tuning.trials import Trial, read_trials

_FILE = "search.toml"


def read_search(path: Path, flags: dict[str, Any]) -> SearchConfig:
    """Read a search from a TOML file; flags, by dotted key, take precedence. Raises ValueError if invalid."""
    if not path.is_file():
        path = _shipped(str(path))
    values: dict[str, Any] = read_toml(path)
    if "train" not in values:
        raise ValueError(f"{path} is not a search: it has no table [train]; put the training config there")
    for key, value in flags.items():
        *parents, last = key.split(".")
        table = values
        for parent in parents:
            table = table.setdefault(parent, {})
        table[last] = value
    return SearchConfig(**values)


def kept_search(run: str) -> SearchConfig:
    """Read the search in the folder OUTPUT/NAME. Raises ValueError if there is none."""
    run = storage.absolute(run.rstrip("/"))
    values = kept_toml(storage.join(run, _FILE))
    if values is None:
        raise ValueError(f"{run} is not a search: there is no {_FILE}; give OUTPUT/NAME of one")
    output, _, name = run.rpartition("/")
    values |= {"output": output, "name": name}
    return SearchConfig(**values)


def print_status(run: str) -> None:
    """Print a search's trials, running or not, and write its report. Raises ValueError if there is none."""
    search = kept_search(run)
    trials = read_trials(search_folder(search))
    width = max(80, shutil.get_terminal_size().columns)
    Console(width=width if trials else None).print(trial_table(trials, _count(search)))
    for trial in trials:
        if trial.error:
            print(f"trial {trial.number} failed: {trial.error}")
    if trials:
        print(f"report: {write_search_report(search, trials)}")


def write_best(run: str, dest: str) -> None:
    """Write the best trial's config to `dest`. Raises ValueError if there is none, or that fails."""
    search = kept_search(run)
    trials = read_trials(search_folder(search))
    if not trials or trials[0].accuracy is None:
        raise ValueError(f"{run} has no evaluated trial yet; see diptych tune status {run}")
    _write(dest, to_toml(best_config(search, trials[0].run)).encode())
    print(f"{dest}: {search.metric} accuracy {trials[0].accuracy:.1%}, {described(trials[0])}")


def run_tuning(search: SearchConfig) -> list[Trial]:
    """Run the search, show its trials, and write its report and best.toml; returns the trials, best first.

    Raises ValueError for an invalid config, data set or cluster, or if no trial was evaluated; Interrupted
    after SIGTERM or Ctrl-C; RunError if another process has taken over the search.
    """
    search = _with_absolute_paths(search)
    scoring(search)
    check_surface(search)
    modules = _modules(search)
    folder = search_folder(search)
    kept_toml(storage.join(folder, _FILE), resumed=True)  # Refuses a search of another format.
    if not read_trials(folder):
        _check_checkpoints(search)
    index, ended = _index(search), Event()
    with leased(folder, ended) as held:
        _keep(search)
        with counted(f"labels of {index.uri}", "fragment") as progress:
            index = with_labels(index, search.train.data, progress)
        _check(held)
        keep_index(folder, "train", index)
        trials = _run(search, index, modules, ended, held)
        _check(held)
        _print_result(search, trials)
    return trials


def _check(held: Held) -> None:
    """Raises RunError where another process has taken the search over."""
    try:
        held.check()
    except UnsavedError as error:
        raise RunError(f"{error}", final=True) from error


def _with_absolute_paths(search: SearchConfig) -> SearchConfig:
    """The search with paths that mean the same in every process."""
    # Unless set otherwise, the best config's own run is written beside the search.
    output = search.output if search.train.output == TrainConfig.output else search.train.output
    train = with_absolute_paths(replace(search.train, output=output))
    space = with_checkpoints(search.space)
    return replace(search, train=train, space=space, output=storage.absolute(search.output))


def _index(search: SearchConfig) -> Index:
    """The images; in a resumed search, those that it began with."""
    index = training_index(search.train)
    index.check_labels("ranking trials", "search with other images")
    kept = kept_index(search_folder(search), "train")
    if kept is None:
        return index
    kept.check_unchanged()
    # Images added since would change which are held out.
    return kept if kept.uri == index.uri else index


def _run(search: SearchConfig, index: Index, modules: list[Path], ended: Event, held: Held) -> list[Trial]:
    """Run the trials on the cluster; returns them, best first."""
    # Ray takes seconds to import; a wrong config should fail sooner.
    from training.ray_train.launch import while_head_answers
    from tuning.search import CPUS_PER_TRIAL, run_search

    folder = search_folder(search)
    workers = most_workers(search.train) * search.train.cpus_per_worker
    with (
        cluster(search.concurrent * (workers + CPUS_PER_TRIAL), modules, ("tune", "resume", folder)),
        LiveTrials(_count(search)) as table,
        stop_signals("ending the search", ended) as stop,
    ):
        trials = while_head_answers(partial(run_search, search, index, table.show, stop.event, held))
    if stop.number:
        raise Interrupted(f"stopped; {_resume_hint(search)}", stop.number)
    return trials


def _print_result(search: SearchConfig, trials: list[Trial]) -> None:
    """Print the trials; write best.toml and the report. Raises ValueError if no trial was evaluated."""
    folder = search_folder(search)
    if not trials or trials[0].accuracy is None:
        failed = next((trial.error for trial in trials if trial.error), "there was no time for one")
        raise ValueError(f"no trial of {folder} was evaluated: {failed}")
    _write(f"{folder}/best.toml", to_toml(best_config(search, trials[0].run)).encode())
    for trial in trials:
        state = f"failed: {trial.error}" if trial.error else trial.state
        print(f"{trial.accuracy or 0:6.1%}  {trial.images:>10,} images  {state}  {described(trial)}")
    _print_certainty(search, trials[0])
    print(f"best: {folder}/best.toml")
    print(f"report: {write_search_report(search, trials)}")
    if any(trial.state == "unfinished" for trial in trials) or len(trials) < _count(search):
        print(f"the time limit has passed; {_resume_hint(search)}")


def _resume_hint(search: SearchConfig) -> str:
    return f"resume with: diptych tune resume {search_folder(search)}"


def _print_certainty(search: SearchConfig, best: Trial) -> None:
    if line := ranking_line(search, best.run):
        print(f"the best: {shown(line, METRICS[search.metric])}, {shown_baselines(line)}")
        for doubt in doubts(line):
            warn(doubt)


def with_checkpoints(space: dict[str, Any]) -> dict[str, Any]:
    """The space, with each run or checkpoint given for `init` replaced by a checkpoint's URI."""

    def found(places: Any) -> Any:
        if isinstance(places, list | tuple):
            return [found(place) for place in places]
        return find_initial(places, warn) if isinstance(places, str) else places

    def of(table: Any, key: str = "") -> Any:
        if not isinstance(table, dict):
            return table
        if key == "when":
            return {name: found(part) if name == "init" else part for name, part in table.items()}
        return {name: of(part, name) for name, part in table.items()}

    whole = {key: of(table) for key, table in space.items()}
    if isinstance(init := whole.get("init"), dict):
        whole["init"] = {kind: values if kind == "when" else found(values) for kind, values in init.items()}
    return whole


def _modules(search: SearchConfig) -> list[Path]:
    """The files of the custom objectives of the trials."""
    train = search.train
    modules = own_modules(train.objective, train.objective_options)
    searched = search.distributions.get("objective")
    for name in searched.values if searched else ():
        modules += own_modules(name)
    return list(dict.fromkeys(modules))


def _check_checkpoints(search: SearchConfig) -> None:
    """ValueError if a checkpoint that trials start from is missing or damaged, or does not fit."""
    train, space = search.train, search.distributions
    searched = search.compound or any(key.startswith("encoder.") for key in space)
    for place in dict.fromkeys([train.init, *(space["init"].values if "init" in space else ())]):
        if place and searched:
            read_initial(place)
        elif place:
            say_fit(check_initial(train.encoder, place))


def _count(search: SearchConfig) -> int:
    """Number of trials in all."""
    return len(trial_points(search))  # TPE draws other points, but the same number.


def _keep(search: SearchConfig) -> None:
    fields = {field.name: getattr(search, field.name) for field in dataclasses.fields(search)}
    kept = {key: value for key, value in fields.items() if value is not None}
    content = encode_toml(kept | {"train": to_values(search.train)})
    _write(storage.join(search_folder(search), _FILE), content)


def _write(uri: str, content: bytes) -> None:
    try:
        storage.write(uri, content)
    except OSError as error:
        raise ValueError(f"cannot write {uri}: {storage.first_line(error)}; choose another place") from error


def _shipped(name: str) -> Path:
    """The TOML file of a search that comes with diptych. Raises ValueError, with all names, if unknown."""
    folder = Path(__file__).parents[1] / "tuning" / "searches"
    if not (path := folder / f"{name}.toml").is_file():
        names = ", ".join(sorted(path.stem for path in folder.glob("*.toml")))
        raise ValueError(f"no search {name!r}: neither a TOML file nor one of {names}")
    return path
