"""A training run from its config to its report, as the commands run it."""

from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.datasets import absolute, read_index, say_mixing
from cluster.ray_cluster import cluster, place
from cluster.run_bar import RunBar
from cluster.signals import Interrupted, stop_signals
from cluster.terminal import Startup, counted, warn
from cluster.trackers import Trackers, check_trackers, open_trackers
from pipelines import storage
from pipelines.index import Index
from pipelines.labels import labelled_part, numbered, read_labels, with_labels
from pipelines.plan import Plan, check_lanes
from training.advice import advice
from training.checkpoint import Checkpoints
from training.config import TrainConfig, most_workers, worker_counts
from training.errors import RunError, StoppedError
from training.evaluation.evaluator import Sets
from training.initial import check_initial, find_initial
from training.lease import Held, leased
from training.metrics import read_metrics
from training.metrics_table import Metrics
from training.objective_builder import count_classes
from training.own_objective import own_modules
from training.report import write_report
from training.report.history import RunHistory
from training.report.verdict import verdict
from training.run_folder import claim_run, find_run, keep_index, kept_index
from training.trainer import make_plan, run_uri, total_steps

if TYPE_CHECKING:
    from training.models.foreign_weights import Fit
    from training.ray_train.launch import Launch


class _Images(NamedTuple):
    """The images of a run's data.train and data.test."""

    train: Index
    test: Index | None

    def named(self) -> dict[str, Index]:
        """The indexes that the run has, by the name that they are kept under."""
        return {name: index for name, index in self._asdict().items() if index}


def run_training(
    config: TrainConfig,
    train: Index | None = None,
    test: Index | None = None,
    startup: Startup | None = None,
    launch: "Launch | None" = None,
) -> Metrics:
    """Train, with progress on the terminal; returns the lines of the run's metrics.jsonl.

    `train` and `test` are the images of the config's data, if they are listed already. `launch` starts the
    workers, as `WorkerPool().launch` does, which reuses those of an earlier run; unset: new workers. Raises
    ValueError for an invalid config, data or cluster, before anything is written; RunError if the run fails;
    Interrupted after SIGTERM or Ctrl-C, once a checkpoint is saved.
    """
    startup = startup or Startup()
    startup.reached("imports")
    config, modules = _validated(config)
    run = run_uri(config)
    resumed = find_run(run, config)
    images = _listed(config, train, test, resumed=resumed)
    done = _steps_done(config)
    sets = Sets.of(config, images.train, images.test)
    plan = make_plan(config, sets.train)
    steps = total_steps(config, plan)
    ended = Event()
    with leased(run, ended) as held:
        _claim(config, images, resumed=resumed)
        if done >= steps:
            print(f"{run} is finished: {done} steps")
        else:
            _check_images(config, images, sets, resumed=resumed, done=done)
            print(_length(plan, steps))
            if not done:
                for line in advice(config, steps, plan.steps_per_epoch):
                    warn(line)
            startup.reached("index")
            _launch(config, sets, steps, done, startup, modules, launch, ended, held)
        _report(config)
        lines = read_metrics(run)
        print(verdict(RunHistory(config, lines)))
        return lines


def _validated(config: TrainConfig) -> tuple[TrainConfig, list[Path]]:
    """The config with absolute paths, and the files of a custom objective that workers import."""
    config = with_absolute_paths(config)
    check_lanes(config.batch_size, config.lanes)
    worker_counts(config)
    check_trackers(config.trackers)
    return config, own_modules(config.objective, config.objective_options)


def _listed(config: TrainConfig, train: Index | None, test: Index | None, *, resumed: bool) -> _Images:
    """The run's images: those that it kept if it is resumed, else those given, else the config's listed now.

    Raises ValueError if they lack the labels that the config needs.
    """
    run = run_uri(config)
    kept = kept_index(run, "train") if resumed else None
    index = kept or labels_known(train or training_index(config), config)
    test_index = None
    if config.data.test:
        kept = kept_index(run, "test") if resumed else None
        test_index = kept or labels_known(
            test or read_index(config.data.test, config.data, index.classes), config
        )
    images = _Images(index, test_index)
    if test_index or config.evaluation.held_out:
        for listed in images.named().values():
            listed.check_labels("evaluation", "leave out --data.test and --evaluation.held-out")
    if config.objective == "supervised":
        count_classes(config, index)
    return images


def _claim(config: TrainConfig, images: _Images, *, resumed: bool) -> None:
    """Write the run's config and, if the run is new, the list of its images."""
    run = run_uri(config)
    claim_run(run, config)
    if not resumed:
        for name, index in images.named().items():
            keep_index(run, name, index)


def _check_images(config: TrainConfig, images: _Images, sets: Sets, *, resumed: bool, done: int) -> None:
    """Raise ValueError if a resumed run's images have changed; say how well a new run's batches are mixed."""
    if resumed:
        for index in images.named().values():
            index.check_unchanged()
    if not done:
        say_mixing(config, sets.train)


def _report(config: TrainConfig) -> None:
    """Write the run's report; a failure to write it is a warning."""
    try:
        report = write_report(config)
        print(f"report: {report}")
        if "://" in report:
            print(f"to look at it: diptych report {run_uri(config)} --output report.html")
    except OSError as error:
        warn(
            f"the report could not be written: {storage.first_line(error)}; {storage.way_out(error)}, then: "
            f"diptych report {run_uri(config)}"
        )


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The config with paths that mean the same in every process, and `init` as what all of them can read."""
    data = config.data
    test = absolute(data.test) if data.test else None
    data = replace(data, train=absolute(data.train), test=test)
    init = find_initial(config.init, warn) if config.init else None
    return replace(config, data=data, output=storage.absolute(config.output), init=init)


def _steps_done(config: TrainConfig) -> int:
    """The step that the run starts at; ValueError if a checkpoint that it needs is damaged or missing."""
    # Workers warn of damaged checkpoints, in the run's metrics too.
    saved = Checkpoints(run_uri(config), config.checkpoint.keep).latest(lambda message: None)
    if saved:
        read_metrics(run_uri(config))  # Workers append to it: damage must show before they start.
        return saved["step"]
    if config.init:
        say_fit(check_initial(config.encoder, config.init))
    return 0


def say_fit(fit: "Fit | None") -> None:
    """Print how many tensors of other libraries' weights fit the encoder; a warning unless all do."""
    if fit:
        (print if fit.complete else warn)(fit.summary)


def _launch(
    config: TrainConfig,
    sets: Sets,
    steps: int,
    done: int,
    startup: Startup,
    modules: list[Path],
    launch: "Launch | None",
    ended: Event,
    held: Held,
) -> None:
    # Ray takes seconds to import; an error in the config should not.
    from training.ray_train.elastic import run_to_its_end
    from training.ray_train.launch import launch as start_workers

    run = run_uri(config)
    print(f"starting {config.workers or 'the'} worker{'' if config.workers == 1 else 's'} {place()} ...")
    with (
        open_trackers(config) as trackers,
        cluster(most_workers(config) * config.cpus_per_worker, modules, ("train", "--resume", run)),
        RunBar(steps, done, config.batch_size, startup) as bar,
        stop_signals("saving after this step", ended) as stop,
    ):
        startup.reached("cluster")
        try:
            run_to_its_end(
                config,
                sets,
                lambda values: _tell(values, bar, trackers),
                stop.event,
                launch=launch or start_workers,
                held=held,
            )
        except StoppedError as stopped:
            if not stop.number:
                raise RunError(
                    f"stopped after step {stopped.step} of {steps}: another process has taken {run} over",
                    final=True,
                ) from stopped
            raise Interrupted(
                f"stopped after step {stopped.step} of {steps}; resume with: diptych train --resume {run}",
                stop.number,
            ) from stopped


def _length(plan: Plan, steps: int) -> str:
    """How many images and steps the run has."""
    each = plan.steps_per_epoch
    return f"{plan.rows.sum():,} images, {steps:,} steps ({steps / each:,.3g} epochs of {each:,})"


def _tell(values: dict[str, Any], bar: RunBar, trackers: Trackers) -> None:
    bar.show(values)
    for warning in trackers.show(values):
        bar.show({"step": values["step"], "warning": warning})


def training_index(config: TrainConfig) -> Index:
    """The index of data.train, its classes counted where the config needs them.

    Sets.of takes of it what is held out and, of the rest, the share of the labels.
    """
    index = read_index(config.data.train, config.data)
    if config.supervised.labels is not None:
        index.check_labels("a share of the labels", "use all images")
    unnamed = not config.supervised.classes and not index.classes
    if config.objective == "supervised" and unnamed and index.has_labels:
        with counted(f"labels of {index.uri}", "fragment") as progress:
            index = with_labels(index, config.data, progress)
            index = numbered(index, read_labels(index, config.data, progress))
    return index


def labels_known(index: Index, config: TrainConfig) -> Index:
    """The index with its labels read, where the config draws from each class to train or evaluate by."""
    settings = config.evaluation
    shares = (settings.held_out, settings.train_images, settings.test_images, config.supervised.labels)
    if all(share is None for share in shares):
        return index
    with counted(f"labels of {index.uri}", "fragment") as progress:
        return with_labels(index, config.data, progress)


def labelled(index: Index, config: TrainConfig, share: float) -> Index:
    """The index of `share` of each class's images. Raises ValueError where there are no labels."""
    index.check_labels("a share of the labels", "use all images")
    with counted(f"labels of {index.uri}", "fragment") as progress:
        return labelled_part(index, config.data, share, seed=config.seed, progress=progress)
