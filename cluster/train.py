"""A training run from its config to its report, as the commands run it."""

from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from cluster.datasets import absolute, read_index, say_mixing
from cluster.ray_cluster import cluster
from cluster.signals import Interrupted, stop_signals
from cluster.terminal import RunBar, Startup, counted, warn
from cluster.trackers import Trackers, check_trackers, open_trackers
from pipelines import storage
from pipelines.index import Index
from pipelines.labels import labelled_part, numbered, read_labels, with_labels
from pipelines.plan import check_lanes
from training.checkpoint import Checkpoints
from training.config import TrainConfig, most_workers, worker_counts
from training.errors import RunError, StoppedError
from training.evaluation.evaluator import Sets
from training.initial import find_initial
from training.lease import Held, leased
from training.metrics import read_metrics
from training.models.encoders import build_encoder
from training.objectives import count_classes, load_initial, own_modules
from training.report import write_report
from training.run_folder import claim_run, find_run, keep_index, kept_index
from training.trainer import make_plan, run_uri, total_steps

if TYPE_CHECKING:
    from training.models.foreign_weights import Fit
    from training.ray_train.launch import Launch


def run_training(
    config: TrainConfig,
    train: Index | None = None,
    test: Index | None = None,
    startup: Startup | None = None,
    launch: "Launch | None" = None,
) -> list[dict[str, Any]]:
    """Train, showing progress on the terminal; the lines of the run's metrics.jsonl.

    `train` and `test` are the images of the config's data, where they are listed already. `launch` provides
    the workers: `WorkerPool().launch` those of the run before it; unset: new ones. Raises ValueError
    where the config, the data or the cluster will not do, before anything is written; RunError if the run
    fails, and Interrupted after SIGTERM or Ctrl-C, once it has saved.
    """
    startup = startup or Startup()
    startup.reached("imports")
    config = with_absolute_paths(config)
    check_lanes(config.batch_size, config.lanes)
    worker_counts(config)
    check_trackers(config.trackers)
    modules = own_modules(config.objective, config.objective_options)
    run = run_uri(config)
    resumed = find_run(run, config)
    kept = kept_index(run, "train") if resumed else None
    index = kept or labels_known(train or training_index(config), config)
    test_index = None
    if config.data.test:
        kept = kept_index(run, "test") if resumed else None
        test_index = kept or labels_known(
            test or read_index(config.data.test, config.data, index.classes), config
        )
    if test_index or config.evaluation.held_out:
        for listed in filter(None, (index, test_index)):
            listed.check_labels("evaluation", "leave out --data.test and --evaluation.held-out")
    if config.objective == "supervised":
        count_classes(config, index)
    done = _steps_done(config)
    sets = Sets.of(config, index, test_index)
    steps = total_steps(config, make_plan(config, sets.train))
    ended = Event()
    with leased(run, ended) as held:
        claim_run(run, config)
        for name, listed in (("train", index), ("test", test_index)):
            if listed and not resumed:
                keep_index(run, name, listed)
        if done >= steps:
            print(f"{run} is finished: {done} steps")
            _report(config)
            return read_metrics(run)
        if resumed:
            for listed in filter(None, (index, test_index)):
                listed.check_unchanged()
        if not done:
            say_mixing(config, sets.train)
        startup.reached("index")
        _launch(config, sets, steps, done, startup, modules, launch, ended, held)
        _report(config)
        return read_metrics(run)


def _report(config: TrainConfig) -> None:
    """Write the run's page; what hinders that costs the page alone."""
    try:
        print(f"report: {write_report(config)}")
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
    """The step that the run begins at; ValueError where a checkpoint that it needs is damaged or missing."""
    # The workers warn of damaged ones, in the run's metrics too.
    saved = Checkpoints(run_uri(config), config.checkpoint.keep).latest(lambda message: None)
    if saved:
        read_metrics(run_uri(config))  # The workers go on with its lines.
        return saved["step"]
    if config.init:
        say_fit(load_initial(build_encoder(config.encoder), config.init))
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
    print(f"{sets.train.rows.sum():,} images; starting {config.workers or 'the'} workers ...")
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
