"""Ray Tune adapter: trials of a training config, each a real run on Ray Train."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from threading import Event
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import ConcurrencyLimiter, SearchAlgorithm, Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from pipelines import storage
from pipelines.sources import Index
from training.attempts import run_to_its_end
from training.checkpoint import Checkpoints
from training.config import TrainConfig, config_hash
from training.evaluator import Sets
from training.metrics import read_metrics
from training.record import claim_run
from training.run import make_plan, run_uri, total_steps
from tuning.compound import multiply_adds, on_surface, scaled, scoring
from tuning.space import Distribution, SearchConfig, with_values

METRIC = "knn_top1"
_SCORE = "score"

# Two numbers that stand for a point of the surface of alpha, beta and gamma.
_SURFACE = ("compound.u", "compound.v")

# A trial itself only waits for its workers, which ask for what they need.
CPUS_PER_TRIAL = 0.1

Show = Callable[[dict[str, Any], dict[str, Any]], None]


def trial_config(search: SearchConfig, values: dict[str, Any]) -> TrainConfig:
    """The training config of a trial; its run is OUTPUT/NAME/trials/HASH, with the hash of that config."""
    drawn = [values[key] for key in _SURFACE if key in values]
    config = with_values(search.train, {key: value for key, value in values.items() if key not in _SURFACE})
    if drawn:
        config = scaled(config, on_surface(*drawn), 1.0)
    folder = storage.join(search.output, search.name, "trials")
    return replace(config, output=folder, name=config_hash(config))


def run_search(search: SearchConfig, index: Index, show: Show) -> list[dict[str, Any]]:
    """Run the trials on the connected Ray cluster; each trial's values, accuracy, images and run, best first.

    Calls show(trial's values, what it reported) in this process. A trial that fails is left out; one that
    an earlier search of the same config has finished is not run again.
    """
    train_index, held_out = index.split(search.held_out, search.seed)
    score = scoring(search)

    def trial(values: dict[str, Any]) -> None:
        config = trial_config(search, values)
        run = run_uri(config)
        claim_run(run, config)

        def report(line: dict[str, Any]) -> None:
            if METRIC in line:
                images = line["step"] * config.batch_size
                tune.report({METRIC: line[METRIC], _SCORE: score(config, line[METRIC]), "images": images})

        done = Checkpoints(run, config.checkpoint.keep).latest_step() or 0
        if done >= total_steps(config, make_plan(config, train_index)):
            for line in read_metrics(run):
                report(line)
        else:
            run_to_its_end(config, Sets(train_index, held_out), report, Event())

    with tempfile.TemporaryDirectory(prefix="diptych-") as scratch:
        results = tune.Tuner(
            tune.with_resources(trial, {"CPU": CPUS_PER_TRIAL}),
            param_space={
                key: tune.grid_search(what.choices) if search.searcher == "grid" else _sampler(what)
                for key, what in search.distributions.items()
            }
            | ({key: tune.uniform(0.0, 1.0) for key in _SURFACE} if search.compound else {}),
            tune_config=tune.TuneConfig(
                num_samples=1 if search.searcher == "grid" else search.trials,
                search_alg=_searcher(search),
                scheduler=_scheduler(search, int(train_index.rows.sum())),
            ),
            run_config=tune.RunConfig(
                storage_path=scratch, name=search.name, verbose=0, callbacks=[_ShowCallback(show)]
            ),
        ).fit()
        found = [_summary(search, result.config, score) for result in results if not result.error]
    return sorted(found, key=lambda trial: -trial["score"])


def _searcher(search: SearchConfig) -> SearchAlgorithm | Searcher:
    if search.searcher == "tpe":
        return ConcurrencyLimiter(
            OptunaSearch(metric=_SCORE, mode="max", seed=search.seed), max_concurrent=search.concurrent
        )
    return BasicVariantGenerator(random_state=search.seed, max_concurrent=search.concurrent)


def _sampler(what: Distribution) -> Any:
    if what.kind == "choice":
        return tune.choice(list(what.values))
    low, high = what.values
    if what.kind == "integers":
        return tune.randint(low, high + 1)
    return tune.loguniform(low, high) if what.kind == "loguniform" else tune.uniform(low, high)


def _scheduler(search: SearchConfig, epoch_images: int) -> FIFOScheduler | ASHAScheduler:
    """Trials are compared after as many images, since a step has more of them where the batch is larger."""
    if search.scheduler == "none":
        return FIFOScheduler()
    train = search.train
    whole = train.steps * train.batch_size if train.steps else train.epochs * epoch_images
    # An epoch leaves out what fills no batch, so its end comes a little before its last image.
    first = max(1, round(0.9 * train.evaluation.every_epochs * epoch_images))
    return ASHAScheduler(
        "images", _SCORE, "max", max_t=max(whole, first), grace_period=first, reduction_factor=2
    )


def _summary(
    search: SearchConfig, values: dict[str, Any] | None, score: Callable[[TrainConfig, float], float]
) -> dict[str, Any]:
    assert values is not None
    config = trial_config(search, values)
    costs = {"multiply_adds": multiply_adds(config)} if search.compound else {}
    last = [line for line in read_metrics(run_uri(config)) if METRIC in line][-1]
    return {
        "values": _shown(values),
        METRIC: last[METRIC],
        "score": score(config, last[METRIC]),
        **costs,
        "images": last["step"] * config.batch_size,
        "run": run_uri(config),
    }


def _shown(values: dict[str, Any]) -> dict[str, Any]:
    """A trial's values, with coefficients for the point of their surface."""
    drawn = [values[key] for key in _SURFACE if key in values]
    coefficients = on_surface(*drawn)._asdict() if drawn else {}
    return {key: value for key, value in values.items() if key not in _SURFACE} | {
        f"encoder.{key}": value for key, value in coefficients.items()
    }


class _ShowCallback(tune.Callback):
    def __init__(self, show: Show) -> None:
        self._show = show

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks, and a terminal cannot be saved.

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._show(_shown(trial.config), result)
