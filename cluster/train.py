"""A training run from its config to its report, as the commands run it."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any

from tqdm import tqdm

from cluster.local import cluster
from cluster.signals import stop_signals
from pipelines import storage
from pipelines.labels import labelled_part
from pipelines.plan import check_lanes
from pipelines.sources import Index, build_index
from training.checkpoint import Checkpoints, find_checkpoint
from training.config import TrainConfig, worker_counts
from training.diagnostics import COLLAPSED_RANK
from training.encoders import build_encoder
from training.evaluator import Sets
from training.faults import StoppedError
from training.metrics import read_metrics
from training.objectives import count_classes, load_initial
from training.record import claim_run, find_run
from training.report import write_report
from training.run import make_plan, run_uri, total_steps


def run_training(config: TrainConfig) -> list[dict[str, Any]]:
    """Train, showing progress on the terminal; the lines of the run's metrics.jsonl.

    Raises ValueError where the config, the data or the cluster will not do, before anything is written.
    """
    config = with_absolute_paths(config)
    check_lanes(config.batch_size, config.lanes)
    worker_counts(config)
    run = run_uri(config)
    resumed = find_run(run, config)
    index = _index(run, "train", config.data.train, config, resumed)
    test_index = None
    if config.data.test:
        test_index = _index(run, "test", config.data.test, config, resumed, index.classes)
    unlabelled = [listed.uri for listed in (index, test_index) if listed and not listed.has_labels]
    if unlabelled and (test_index or config.evaluation.held_out):
        raise ValueError(
            f"evaluation needs labels, and {unlabelled[0]} has none: name their column with "
            "--data.label-column, or leave out --data.test and --evaluation.held-out"
        )
    if config.objective == "supervised":
        count_classes(config, index)
    if config.init:
        load_initial(build_encoder(config.encoder), config.init)
    sets = Sets.of(config, index, test_index)
    steps = total_steps(config, make_plan(config, sets.train))
    claim_run(run, config)
    for name, listed in (("train", index), ("test", test_index)):
        if listed and not resumed:
            storage.write(storage.join(run, "index", f"{name}.parquet"), listed.to_bytes())
    done = Checkpoints(run, config.checkpoint.keep).latest_step() or 0
    if done >= steps:
        print(f"{run} is finished: {done} steps. Its report is {write_report(config)}")
        return read_metrics(run)
    _launch(config, sets, steps, done)
    print(f"report: {write_report(config)}")
    return read_metrics(run)


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The config as it means the same in every process, and the checkpoint named that `init` leads to."""
    data = config.data
    test = storage.absolute(data.test) if data.test else None
    data = replace(data, train=storage.absolute(data.train), test=test)
    init = find_checkpoint(storage.absolute(config.init)) if config.init else None
    return replace(config, data=data, output=storage.absolute(config.output), init=init)


def _launch(config: TrainConfig, sets: Sets, steps: int, done: int) -> None:
    # Ray takes seconds to import; an error in the config should not.
    from training.attempts import run_to_its_end
    from training.worker import CPUS_PER_WORKER, RunError

    print(f"{sets.train.rows.sum():,} images; starting {config.workers or 'the'} workers ...")
    most = worker_counts(config)[-1] if config.workers else 1
    with cluster(cpus=most * CPUS_PER_WORKER), _ProgressBar(steps, done) as bar, stop_signals() as stop:
        try:
            run_to_its_end(config, sets, bar.show, stop.event)
        except RunError as error:
            sys.exit(f"diptych: {error}")
        except StoppedError as stopped:
            print(
                f"\ndiptych: stopped after step {stopped.step} of {steps}; "
                f"go on with: diptych train --resume {run_uri(config)}",
                file=sys.stderr,
            )
            sys.exit(128 + stop.number)


def _index(
    run: str, name: str, uri: str, config: TrainConfig, resumed: bool, classes: tuple[str, ...] = ()
) -> Index:
    """The index that the run has kept, so that a resume lists nothing again, or a new one."""
    kept = storage.read(storage.join(run, "index", f"{name}.parquet")) if resumed else None
    if kept:
        return Index.from_bytes(kept)
    index = read_index(uri, config, classes)
    share = config.supervised.labels
    return index if share is None or name != "train" else labelled(index, config, share)


def labelled(index: Index, config: TrainConfig, share: float) -> Index:
    """The index of `share` of each class's images, with a progress bar where that takes more than a second.

    Raises ValueError where there are no labels.
    """
    if not index.has_labels:
        raise ValueError(f"{index.uri} has no labels: name their column with --data.label-column")
    bar = tqdm(desc=f"labels of {index.uri}", unit="fragment", leave=False, delay=1)

    def progress(done: int, fragments: int) -> None:
        bar.total = fragments
        bar.update(done - bar.n)

    with bar:
        return labelled_part(index, config.data, share, seed=config.seed, progress=progress)


def read_index(uri: str, config: TrainConfig, classes: tuple[str, ...] = ()) -> Index:
    """The index of `uri`, with a progress bar where it takes more than a second."""
    bar = tqdm(desc=f"index {uri}", unit="file", leave=False, delay=1)

    def progress(done: int, files: int) -> None:
        bar.total = files
        bar.update(done - bar.n)

    with bar:
        return build_index(uri, config.data, progress, classes=classes)


class _ProgressBar:
    """The steps of a run on the terminal, and a line for each evaluation."""

    def __init__(self, steps: int, done: int) -> None:
        self._steps, self._done = steps, done
        self._bar: tqdm | None = None

    def __enter__(self) -> "_ProgressBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.close()

    def show(self, values: dict[str, Any]) -> None:
        if self._bar is None:  # Only now do steps take time, and not the cluster's start.
            self._bar = tqdm(total=self._steps, initial=self._done, desc="train", unit="step", smoothing=0.1)
        if "loss" not in values:
            self._bar.write(f"step {values['step']}: {', '.join(_noted(values))}")
            return
        stages = {key: seconds for key, seconds in values.items() if key.endswith("_seconds")}
        waited = values["data_wait_seconds"] / sum(stages.values())
        self._bar.set_postfix_str(
            f"epoch {values['epoch']}, loss {values['loss']:.3f}, learning rate "
            f"{values['learning_rate']:.3g}, {values['images_per_second']:,.0f} images/s, "
            f"{waited:.0%} waiting for data",
            refresh=False,
        )
        self._bar.update(values["step"] - self._bar.n)


def _noted(values: dict[str, Any]) -> Iterator[str]:
    """What an evaluation, or a look at the images left out, found."""
    if "knn_top1" in values:
        pixels = values.get("knn_top1_pixels")
        yield f"kNN accuracy {values['knn_top1']:.1%}" + (f" (raw pixels {pixels:.1%})" if pixels else "")
    if "top1" in values:
        yield f"classifier's accuracy {values['top1']:.1%}"
    if "knn_top1_test" in values:
        yield f"on the test images {values['knn_top1_test']:.1%}"
    if "restarting" in values:
        yield f"going on from there, for {values['restarting']}"
    if "warning" in values:
        yield f"warning: {values['warning']}"
    if "rolled_back_to" in values:
        yield (
            f"warning: the loss was not finite several times in a row; back to the weights of step "
            f"{values['rolled_back_to']}"
        )
    if "quarantined" in values:
        yield f"{values['quarantined']:,} images left out so far"
    if "effective_rank" in values:
        yield f"effective rank {values['effective_rank']:.1f}"
        if values["effective_rank"] < COLLAPSED_RANK:
            yield "warning: the features have collapsed to a point; try a lower learning rate"
