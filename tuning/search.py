"""Ray Tune adapter: trials of a training config, each a real run on Ray Train."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from threading import Event
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from pipelines import storage
from pipelines.sources import Index
from training.attempts import run_to_its_end
from training.checkpoint import Checkpoints
from training.config import TrainConfig, config_hash
from training.evaluator import Sets
from training.metrics import read_metrics
from training.record import claim_run
from training.run import make_plan, run_uri, total_steps
from tuning.space import Distribution, SearchConfig, with_values

METRIC = "knn_top1"

# A trial itself only waits for its workers, which ask for what they need.
CPUS_PER_TRIAL = 0.1

Show = Callable[[dict[str, Any], dict[str, Any]], None]


def trial_config(search: SearchConfig, values: dict[str, Any]) -> TrainConfig:
    """The training config of a trial; its run is OUTPUT/NAME/trials/HASH, with the hash of that config."""
    config = with_values(search.train, values)
    folder = storage.join(search.output, search.name, "trials")
    return replace(config, output=folder, name=config_hash(config))


def run_search(search: SearchConfig, index: Index, show: Show) -> list[dict[str, Any]]:
    """Run the trials on the connected Ray cluster; each trial's values, accuracy, images and run, best first.

    Calls show(trial's values, what it reported) in this process. A trial that fails is left out; one that
    an earlier search of the same config has finished is not run again.
    """
    train_index, held_out = index.split(search.held_out, search.seed)

    def trial(values: dict[str, Any]) -> None:
        config = trial_config(search, values)
        run = run_uri(config)
        claim_run(run, config)

        def report(line: dict[str, Any]) -> None:
            if METRIC in line:
                tune.report({METRIC: line[METRIC], "images": line["step"] * config.batch_size})

        done = Checkpoints(run, config.checkpoint.keep).latest_step() or 0
        if done >= total_steps(config, make_plan(config, train_index)):
            for line in read_metrics(run):
                report(line)
        else:
            run_to_its_end(config, Sets(train_index, held_out), report, Event())

    with tempfile.TemporaryDirectory(prefix="diptych-") as scratch:
        results = tune.Tuner(
            tune.with_resources(trial, {"CPU": CPUS_PER_TRIAL}),
            param_space={key: _sampler(what) for key, what in search.distributions.items()},
            tune_config=tune.TuneConfig(
                num_samples=search.trials,
                search_alg=BasicVariantGenerator(random_state=search.seed, max_concurrent=search.concurrent),
                scheduler=_scheduler(search, int(train_index.rows.sum())),
            ),
            run_config=tune.RunConfig(
                storage_path=scratch, name=search.name, verbose=0, callbacks=[_ShowCallback(show)]
            ),
        ).fit()
        found = [_summary(search, result.config) for result in results if not result.error]
    return sorted(found, key=lambda trial: -trial[METRIC])


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
        "images", METRIC, "max", max_t=max(whole, first), grace_period=first, reduction_factor=2
    )


def _summary(search: SearchConfig, values: dict[str, Any] | None) -> dict[str, Any]:
    assert values is not None
    config = trial_config(search, values)
    last = [line for line in read_metrics(run_uri(config)) if METRIC in line][-1]
    return {
        "values": values,
        METRIC: last[METRIC],
        "images": last["step"] * config.batch_size,
        "run": run_uri(config),
    }


class _ShowCallback(tune.Callback):
    def __init__(self, show: Show) -> None:
        self._show = show

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks, and a terminal cannot be saved.

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._show(trial.config, result)
