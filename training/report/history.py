"""A run's files, read for its report, whether the run has finished, was stopped or is still running."""

import math
from collections import Counter
from dataclasses import dataclass, field
from json import JSONDecodeError
from typing import get_args

import numpy as np

from pipelines import storage
from pipelines.quarantine import read_quarantine
from training.config import TrainConfig
from training.metrics import read_metrics
from training.metrics_table import Metrics
from training.run_folder import read_config
from training.step_timer import Stage
from training.trainer import run_uri

STAGES: tuple[str, ...] = get_args(Stage)


@dataclass(frozen=True, eq=False)
class RunHistory:
    """A run's config and the lines of its metrics.jsonl.

    quarantined: number of quarantined images by reason. views: the PNG of images and their views.
    """

    config: TrainConfig
    metrics: Metrics
    quarantined: Counter[str] = field(default_factory=Counter)
    views: bytes | None = None

    @property
    def uri(self) -> str:
        return run_uri(self.config)

    def lines_with(self, key: str) -> Metrics:
        return self.metrics.having(key)

    @property
    def steps(self) -> Metrics:
        """The lines of steps that were not skipped."""
        return self.lines_with("loss")

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of all steps, without evaluations and the time between two parts of the run."""
        return float((self.config.batch_size / self.steps.column("images_per_second")).sum())

    def stage_seconds(self) -> dict[str, float]:
        """Seconds of each stage summed over all steps; empty if the metrics have none."""
        sums = {stage: float(np.nansum(self.steps.column(f"{stage}_seconds"))) for stage in STAGES}
        return sums if any(sums.values()) else {}


def collapsed_loss(config: TrainConfig) -> float | None:
    """The loss of features that are all alike, so that all similarities are equal; None if unknown.

    NT-Xent then chooses among 2N - 1 images at random, and DCL, which leaves the partner out, among 2N - 2.
    """
    others = {"nt-xent": 2 * config.batch_size - 1, "dcl": 2 * config.batch_size - 2}
    if config.objective != "simclr" or config.simclr.loss not in others:
        return None
    return math.log(others[config.simclr.loss])


def read_run(run: str) -> RunHistory:
    """The run at the path or URI `run`; raises ValueError if there is none or it cannot be read."""
    try:
        return read_history(read_config(run))
    except (OSError, JSONDecodeError) as error:
        raise ValueError(f"cannot read the run {run}: {storage.first_line(error)}") from error


def read_history(config: TrainConfig) -> RunHistory:
    """The files of the run of `config`."""
    run = run_uri(config)
    images = read_quarantine(storage.join(run, "quarantine.jsonl"))
    return RunHistory(
        config,
        read_metrics(run),
        quarantined=Counter(image.reason for image in images),
        views=storage.read(storage.join(run, "views.png")),
    )
