"""Run a search under Ray Tune; each trial is a run on Ray Train."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from threading import Event
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from pipelines.index import Index
from pipelines.storage.scratch import scratch_folder
from training.checkpoint import Checkpoints
from training.config import TrainConfig, worker_counts
from training.config.messages import one_line
from training.errors import RunError, UnsavedError
from training.evaluation.evaluator import Sets
from training.lease import Held
from training.metrics import read_metrics
from training.ray_train.elastic import run_to_its_end
from training.ray_train.nodes import fitting_workers, usable_resources, wait_for_nodes
from training.ray_train.worker_pool import WorkerPool
from training.run_folder import claim_run
from training.trainer import make_plan, run_uri, total_steps
from tuning.asha import ASHA
from tuning.compound import scoring
from tuning.config import METRICS, SearchConfig
from tuning.searcher import EVALUATIONS, FINISHED, SCORE, PointSearcher, TrialSlots
from tuning.space import Point
from tuning.trial_config import trial_config, trial_points
from tuning.trials import Trial, TrialLog

# The searcher itself says when there are no more trials.
_NO_LIMIT = 10**9

# A trial itself only waits for its workers, which request their own resources.
CPUS_PER_TRIAL = 0.1

_SETTINGS = {
    # A trial that fails reports only that, without a score.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # Tune's progress output would mix with ours, and its files would repeat ours.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The caller decides how Ctrl-C is handled.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}

_AWS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")


def run_search(
    search: SearchConfig,
    index: Index,
    show: Callable[[list[Trial]], None],
    ending: Event,
    held: Held,
) -> list[Trial]:
    """Run the trials on the connected Ray cluster, or resume an earlier call's; returns them, best first.

    Calls show(trials) after each change; ends when `ending` is set, or another process has taken the lease
    `held` of the search's folder. A failed trial is marked, and the others continue. Raises ValueError if the
    cluster is too small for a trial.
    """
    sets = search_sets(search, index)
    if search.train.wait_for_nodes:
        most = search.concurrent
        wait_for_nodes(search.train, partial(_at_a_time, search), most, ending, groups=most)
    slots = TrialSlots(_at_a_time(search))
    log = TrialLog(search, show, held)
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    keep_keys_out_of_runtime_environments()
    with scratch_folder() as scratch:
        _tuner(_Shared(search, sets, log.stopped_early(), held), slots, log, ending, scratch).fit()
    return log.close()


def search_sets(search: SearchConfig, index: Index) -> Sets:
    """The images to train on and to rank by, shared by all trials and chosen by the search's seed."""
    evaluation = replace(search.train.evaluation, held_out=search.held_out)
    return Sets.of(replace(search.train, seed=search.seed, evaluation=evaluation), index, None)


def keep_keys_out_of_runtime_environments() -> None:
    """Keep Tune from copying this process's AWS keys into its trials' runtime environments, which Ray logs.

    Ray 2.60 has no public setting for that. If its private list is gone, Tune's default stays.
    """
    try:
        from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE
    except ImportError:
        return
    ENV_VARS_TO_PROPAGATE.difference_update(_AWS_KEYS)


def _tuner(shared: "_Shared", slots: TrialSlots, log: TrialLog, ending: Event, scratch: str) -> tune.Tuner:
    search = shared.search
    points = log.points() if search.searcher == "tpe" else trial_points(search)
    trainable = tune.with_parameters(_Trial, shared=shared)
    return tune.Tuner(
        tune.with_resources(trainable, {"CPU": CPUS_PER_TRIAL}),
        tune_config=tune.TuneConfig(
            num_samples=_NO_LIMIT,
            search_alg=PointSearcher(search, points, slots),
            scheduler=_scheduler(search, shared.sets, slots),
            time_budget_s=60 * search.max_minutes if search.max_minutes else None,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            storage_path=scratch,
            name=search.name,
            verbose=0,
            stop=_Ending(ending, log),
            callbacks=[_Logging(log)],
            failure_config=tune.FailureConfig(max_failures=search.train.retries),
        ),
    )


@dataclass(frozen=True, eq=False)
class _Shared:
    """Values that all trials share; `stopped_early` has the images of runs that an earlier call stopped.

    `held` is the lease of the search's folder, below which the trials write.
    """

    search: SearchConfig
    sets: Sets
    stopped_early: dict[str, int]
    held: Held


class _Trial(tune.Trainable):
    """A run; each step trains to the next evaluation. The next trial reuses its workers."""

    def setup(self, config: Point, shared: _Shared) -> None:  # pyright: ignore
        self._shared, self._pool = shared, WorkerPool()
        self.reset_config(config)

    def reset_config(self, new_config: Point) -> bool:
        self._point, self._evaluations = new_config, 0
        return True

    def step(self) -> dict[str, Any]:
        search = self._shared.search
        try:
            config = trial_config(search, self._point)
            steps, every = _steps(config, self._shared.sets)
            until = min((self._evaluations + 1) * every, steps)
            line = self._evaluated(config, until) or self._train(config, until)
        except (RunError, UnsavedError, ValueError) as error:
            return {"done": True, "failure": one_line(error)}
        self._evaluations += 1
        accuracy, images = line[METRICS[search.metric]], until * config.batch_size
        stopped = self._shared.stopped_early.get(run_uri(config), images + 1) <= images
        return {
            EVALUATIONS: self._evaluations,
            SCORE: scoring(search)(config, accuracy),
            "accuracy": accuracy,
            "images": images,
            FINISHED: until == steps,
            "done": until == steps or stopped,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {"evaluations": self._evaluations}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        assert checkpoint
        self._evaluations = checkpoint["evaluations"]

    def cleanup(self) -> None:
        self._pool.close()

    def _evaluated(self, config: TrainConfig, until: int) -> dict[str, Any] | None:
        """The run's metrics line at step `until`, if it has a checkpoint there or later."""
        run = run_uri(config)
        if (Checkpoints(run, config.checkpoint.keep).latest_step() or 0) < until:
            return None
        metric = METRICS[self._shared.search.metric]
        found = [line for line in read_metrics(run) if metric in line and line["step"] == until]
        return found[-1] if found else None

    def _train(self, config: TrainConfig, until: int) -> dict[str, Any]:
        held = self._shared.held
        held.check()
        claim_run(run_uri(config), config)
        run_to_its_end(
            config,
            self._shared.sets,
            lambda event: None,
            Event(),
            until=until,
            launch=self._pool.launch,
            held=held,
        )
        line = self._evaluated(config, until)
        assert line
        return line


class _Ending(tune.Stopper):
    """Ends the search when the event is set, or another process has taken the search over."""

    def __init__(self, event: Event, log: TrialLog) -> None:
        self._event, self._log = event, log

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it; neither an event nor the log can be pickled.

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._event.is_set() or self._log.taken_over


class _Logging(tune.Callback):
    """Writes the trials' events to the trial log."""

    def __init__(self, log: TrialLog) -> None:
        self._log = log

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks, and the table on the terminal cannot be pickled.

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._log.start(trial.trial_id, trial.config)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "failure" not in result:
            found = {key: result[key] for key in ("images", "accuracy")}
            self._log.record(trial.trial_id, **found, score=result[SCORE])
        self._log.pause([other.trial_id for other in trials if other.status == "PAUSED"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result
        if "failure" in result:
            self._log.end(trial.trial_id, "failed", result["failure"])
        else:
            self._log.end(trial.trial_id, "finished" if result[FINISHED] else "stopped early")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._log.end(trial.trial_id, "failed", "the process that ran the trial was lost")


def _scheduler(search: SearchConfig, sets: Sets, slots: TrialSlots) -> TrialScheduler:
    return ASHA(_evaluations(search, sets), slots) if search.scheduler == "asha" else FIFOScheduler()


def _steps(config: TrainConfig, sets: Sets) -> tuple[int, int]:
    """Number of steps in a run, and between two evaluations."""
    plan = make_plan(config, sets.train)
    steps = total_steps(config, plan)
    return steps, config.evaluation.every_epochs * plan.steps_per_epoch or steps


def _evaluations(search: SearchConfig, sets: Sets) -> int:
    """Largest number of evaluations of a trial."""
    train, every = search.train, search.train.evaluation.every_epochs
    if not every:
        return 1
    if train.steps is None:
        return -(-train.epochs // every)
    batch_size = search.distributions.get("batch_size")
    largest = max(batch_size.values) if batch_size else train.batch_size
    return -(-train.steps * largest // (every * int(sets.train.rows.sum())))


def _at_a_time(search: SearchConfig) -> int:
    """Number of trials that run at the same time. Raises ValueError if the cluster is too small for one."""
    train, resources = search.train, usable_resources()
    train = replace(train, workers=train.workers or 1)
    workers = fitting_workers(train)
    fewest = worker_counts(train)[0]
    if (needed := fewest * train.cpus_per_worker + CPUS_PER_TRIAL) > resources.get("CPU", 0.0):
        # Its workers would wait forever for the CPU share that the trial itself takes.
        raise ValueError(
            f"a trial needs {needed:g} CPUs of the cluster, which has {resources.get('CPU', 0.0):g}; "
            "try a smaller train.cpus_per_worker"
        )
    cpus = resources.get("CPU", 0.0) / (workers * train.cpus_per_worker + CPUS_PER_TRIAL)
    share = 1.0 if train.gpus_per_worker is None else train.gpus_per_worker
    gpus = resources.get("GPU", 0.0) / (workers * share) if share else 0.0
    return max(1, min(search.concurrent, int(cpus), int(gpus) if gpus >= 1 else search.concurrent))
