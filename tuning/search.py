"""Ray Tune adapter: trials of a training config, each a real run on Ray Train."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from threading import Event
from typing import Any

import ray
from ray import tune
from ray.tune.execution import class_cache

from pipelines.scratch import scratch_folder
from pipelines.sources import Index
from training.attempts import run_to_its_end
from training.capacity import fitting_workers, wait_for_nodes
from training.checkpoint import Checkpoints
from training.config import TrainConfig, worker_counts
from training.crew import Crew
from training.evaluator import Sets
from training.faults import RunError
from training.messages import one_line
from training.metrics import read_metrics
from training.nodes import usable_resources
from training.record import claim_run
from training.run import make_plan, run_uri, total_steps
from tuning.book import Book
from tuning.compound import scoring
from tuning.config import METRICS, SearchConfig
from tuning.room import EVALUATIONS, FINISHED, SCORE, Room
from tuning.space import Point
from tuning.strategies import member_number, param_space, scheduler, searcher, waits
from tuning.trials import Trial
from tuning.variants import branched, trial_config, trial_points

# The searcher says itself when there is no other trial.
_UNTIL_IT_ENDS = 10**9

# A trial itself only waits for its workers, which ask for what they need.
CPUS_PER_TRIAL = 0.1

_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")


def run_search(
    search: SearchConfig, index: Index, show: Callable[[list[Trial]], None], ending: Event
) -> list[Trial]:
    """Run the trials on the connected Ray cluster, from where an earlier call has left them; the best first.

    Calls show(trials) after each change; ends once `ending` is set. A trial that fails is marked, and the
    others go on. Raises ValueError where the cluster could never hold a trial.
    """
    sets = search_sets(search, index)
    if search.train.wait_for_nodes:
        most = search.concurrent
        wait_for_nodes(search.train, partial(_at_a_time, search), most, ending, groups=most)
    room = Room(_at_a_time(search))
    book = Book(search, show)
    # A trial that fails reports that alone, and ends.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    # Tune's own account of what it does would run through ours, and its files would tell it again.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # Tune would hand this process's keys to the trials in their runtime environment, which Ray logs.
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(_KEYS)
    # Who calls this decides what Ctrl-C does.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    shared = _Shared(search, sets, book.stopped())
    with scratch_folder() as scratch:
        points = book.points() if search.searcher == "tpe" else trial_points(search)
        tune.Tuner(
            tune.with_resources(tune.with_parameters(_Trial, shared=shared), _resources(search, room.size)),
            param_space=param_space(search),
            tune_config=tune.TuneConfig(
                num_samples=len(points) if waits(search) else _UNTIL_IT_ENDS,
                search_alg=searcher(search, points, room),
                scheduler=scheduler(search, _evaluations(search, sets), room),
                time_budget_s=60 * search.max_minutes if search.max_minutes else None,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                storage_path=scratch,
                name=search.name,
                verbose=0,
                stop=_Ending(ending),
                callbacks=[_Telling(book)],
                failure_config=tune.FailureConfig(max_failures=search.train.retries),
            ),
        ).fit()
    return book.close()


def search_sets(search: SearchConfig, index: Index) -> Sets:
    """The images that all trials train on and are ranked by, chosen by the search's seed."""
    evaluation = replace(search.train.evaluation, held_out=search.held_out)
    return Sets.of(replace(search.train, seed=search.seed, evaluation=evaluation), index, None)


@dataclass(frozen=True, eq=False)
class _Shared:
    """What all trials share; `stopped` are runs that an earlier call has ended, and after how many images."""

    search: SearchConfig
    sets: Sets
    stopped: dict[str, int]


class _Trial(tune.Trainable):
    """A run, from one evaluation to the next with each step; its workers stay for the trial after it."""

    def setup(self, config: Point, shared: _Shared) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._shared, self._crew = shared, Crew()
        self.reset_config(config)

    def reset_config(self, new_config: Point) -> bool:
        self._point, self._branch, self._evaluations = new_config, None, 0
        self._run, self._at_step = "", 0
        return True

    def step(self) -> dict[str, Any]:
        shared = self._shared
        try:
            config = trial_config(
                shared.search, self._point, member_number(shared.search, self.trial_id), self._branch
            )
            self._run = run_uri(config)
            steps, every = _steps(config, shared.sets)
            until = min((self._evaluations + 1) * every, steps)
            line = self._judged(config, until) or self._train(config, until)
        except (RunError, ValueError) as error:
            return {"done": True, "failure": one_line(error)}
        self._evaluations, self._at_step = self._evaluations + 1, until
        accuracy, images = line[METRICS[shared.search.metric]], until * config.batch_size
        stopped = shared.stopped.get(self._run, images + 1) <= images
        return {
            EVALUATIONS: self._evaluations,
            SCORE: scoring(shared.search)(config, accuracy),
            "accuracy": accuracy,
            "images": images,
            "run": self._run,
            FINISHED: until == steps,
            "done": until == steps or stopped,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {
            "trial": self.trial_id,
            "run": self._run,
            "step": self._at_step,
            "branch": self._branch,
            "evaluations": self._evaluations,
        }

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        assert checkpoint
        self._evaluations = checkpoint["evaluations"]
        self._branch = checkpoint["branch"]
        if checkpoint["trial"] != self.trial_id:  # The values are new too: they belong to another run.
            self._branch = branched(self._shared.search, checkpoint["run"], checkpoint["step"])

    def cleanup(self) -> None:
        self._crew.close()

    def _judged(self, config: TrainConfig, until: int) -> dict[str, Any] | None:
        """What the run found after `until` steps, if it has come there and saved."""
        if (Checkpoints(self._run, config.checkpoint.keep).latest_step() or 0) < until:
            return None
        metric = METRICS[self._shared.search.metric]
        found = [line for line in read_metrics(self._run) if metric in line and line["step"] == until]
        return found[-1] if found else None

    def _train(self, config: TrainConfig, until: int) -> dict[str, Any]:
        claim_run(self._run, config)
        run_to_its_end(
            config, self._shared.sets, lambda event: None, Event(), until=until, launch=self._crew.launch
        )
        line = self._judged(config, until)
        assert line
        return line


class _Ending(tune.Stopper):
    """Ends the search once the event is set."""

    def __init__(self, event: Event) -> None:
        self._event = event

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves it, and an event cannot be saved.

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._event.is_set()


class _Telling(tune.Callback):
    """Tells the book what Tune does."""

    def __init__(self, book: Book) -> None:
        self._book = book

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks, and what shows them cannot be saved.

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._book.begin(trial.trial_id, trial.config, member_number(self._book.search, trial.trial_id))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "failure" not in result:
            self._book.tell(trial.trial_id, trial.config, result)
        self._book.wait([other.trial_id for other in trials if other.status == "PAUSED"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result
        if "failure" in result:
            self._book.end(trial.trial_id, "failed", result["failure"])
        else:
            self._book.end(trial.trial_id, "finished" if result[FINISHED] else "stopped early")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._book.end(trial.trial_id, "failed", "the process that looked after it was lost")


def _steps(config: TrainConfig, sets: Sets) -> tuple[int, int]:
    """Steps of a run, and after how many of them it is evaluated."""
    plan = make_plan(config, sets.train)
    steps = total_steps(config, plan)
    return steps, config.evaluation.every_epochs * plan.steps_per_epoch or steps


def _evaluations(search: SearchConfig, sets: Sets) -> int:
    """How often a trial is evaluated, at most."""
    train, every = search.train, search.train.evaluation.every_epochs
    if not every:
        return 1
    if train.steps is None:
        return -(-train.epochs // every)
    batch_size = search.distributions.get("batch_size")
    largest = max(batch_size.values) if batch_size else train.batch_size
    return -(-train.steps * largest // (every * int(sets.train.rows.sum())))


def _at_a_time(search: SearchConfig) -> int:
    """How many trials run at a time; ValueError where the cluster could hold none."""
    train, resources = search.train, usable_resources()
    train = replace(train, workers=train.workers or 1)
    workers = fitting_workers(train)
    fewest = worker_counts(train)[0]
    if (needed := fewest * train.cpus_per_worker + CPUS_PER_TRIAL) > resources.get("CPU", 0.0):
        # Its workers would wait forever for the share of a CPU that the trial itself has.
        raise ValueError(
            f"a trial needs {needed:g} CPUs of the cluster, which has {resources.get('CPU', 0.0):g}; "
            "try a smaller train.cpus_per_worker"
        )
    cpus = resources.get("CPU", 0.0) / (workers * train.cpus_per_worker + CPUS_PER_TRIAL)
    share = 1.0 if train.gpus_per_worker is None else train.gpus_per_worker
    gpus = resources.get("GPU", 0.0) / (workers * share) if share else 0.0
    return max(1, min(search.concurrent, int(cpus), int(gpus) if gpus >= 1 else search.concurrent))


def _resources(search: SearchConfig, at_a_time: int) -> dict[str, float]:
    """What a trial itself asks for: where trials wait, a share of this node, which has room for so many."""
    if not waits(search):
        return {"CPU": CPUS_PER_TRIAL}
    here = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
    (name,) = (name for name in node["Resources"] if name == f"node:{node['NodeManagerAddress']}")
    return {"CPU": CPUS_PER_TRIAL, name: round(1 / (at_a_time + 0.5), 4)}
