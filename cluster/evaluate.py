"""`diptych eval`: a finished run's encoder is judged, and the result kept beside the run."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cluster.local import cluster
from cluster.train import read_index
from pipelines import storage
from pipelines.sources import Index
from training.checkpoint import Checkpoints
from training.config import TrainConfig
from training.evaluator import Sets
from training.protocols import Protocol
from training.record import read_config

_FILE = "evaluations.jsonl"


def run_evaluation(
    run: str,
    protocol: Callable[[int], Protocol],
    *,
    step: int | None,
    test: str | None,
    workers: int | None,
    neighbours: int | None,
) -> dict[str, Any]:
    """Judge the encoder of `step`, or of the newest checkpoint, by `protocol`; the line that is kept.

    Raises ValueError where there is no such run, checkpoint or labelled test set.
    """
    run = storage.absolute(run.rstrip("/"))
    config = _config(run, test, workers, neighbours)
    checkpoints = Checkpoints(run, config.checkpoint.keep)
    step = checkpoints.latest_step() if step is None else step
    if step is None:
        raise ValueError(f"{run} has no checkpoint yet; let it train until its first")
    checkpoints.load(step)  # What cannot be loaded is told before a cluster starts.
    sets = _sets(run, config)
    found = _launch(config, sets, protocol(step))
    before = storage.read(storage.join(run, _FILE)) or b""
    storage.write(storage.join(run, _FILE), before + json.dumps(found).encode() + b"\n")
    return found


def _config(run: str, test: str | None, workers: int | None, neighbours: int | None) -> TrainConfig:
    config = read_config(run)
    output, _, name = run.rpartition("/")  # A run may have been moved.
    data = replace(config.data, test=storage.absolute(test) if test else config.data.test)
    if not data.test:
        raise ValueError(f"{run} was trained without test images; give labelled ones with --test")
    evaluation = replace(config.evaluation, neighbours=neighbours or config.evaluation.neighbours)
    return replace(
        config, data=data, evaluation=evaluation, output=output, name=name, workers=workers or config.workers
    )


def _sets(run: str, config: TrainConfig) -> Sets:
    kept = storage.read(storage.join(run, "index", "train.parquet"))
    train = Index.from_bytes(kept) if kept else read_index(config.data.train, config)
    assert config.data.test
    test = read_index(config.data.test, config, train.classes)
    for index in (train, test):
        if not index.has_labels:
            raise ValueError(f"evaluation needs labels, and {index.uri} has none")
    return Sets.of(config, train, test)


def _launch(config: TrainConfig, sets: Sets, protocol: Protocol) -> dict[str, Any]:
    # Ray takes seconds to import; an error in the arguments should not.
    from training.worker import CPUS_PER_WORKER, RunError, launch

    found: dict[str, Any] = {}
    with cluster(cpus=(config.workers or 1) * CPUS_PER_WORKER):
        try:
            launch(config, sets, found.update, task=protocol)
        except RunError as error:
            sys.exit(f"diptych: {error}")
    return found
