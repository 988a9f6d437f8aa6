"""What a run has left, read for its report: finished, stopped, or still going on."""

import math
from collections import Counter
from dataclasses import dataclass, field
from json import JSONDecodeError
from typing import Any, get_args

from pipelines import storage
from pipelines.quarantine import read_quarantine
from training.config import TrainConfig
from training.metrics import read_metrics
from training.record import read_config
from training.run import run_uri
from training.stages import Stage

STAGES: tuple[str, ...] = get_args(Stage)


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A run's config, and the lines of its metrics.jsonl.

    left_out: how many images were left out, by reason. views: the PNG of images and their views.
    """

    config: TrainConfig
    metrics: list[dict[str, Any]]
    left_out: Counter[str] = field(default_factory=Counter)
    views: bytes | None = None

    @property
    def uri(self) -> str:
        return run_uri(self.config)

    def having(self, key: str) -> list[dict[str, Any]]:
        """The lines that have `key`."""
        return [line for line in self.metrics if key in line]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of steps that were not skipped."""
        return self.having("loss")

    @property
    def seconds(self) -> float:
        """What the steps took by the clock, without evaluations and what lay between two parts of the run."""
        return sum(self.config.batch_size / line["images_per_second"] for line in self.steps)

    def stage_seconds(self) -> dict[str, float]:
        """The seconds of each stage of a step, over all steps; none where none were written down."""
        sums = {
            stage: math.fsum(line.get(f"{stage}_seconds", 0.0) for line in self.steps) for stage in STAGES
        }
        return sums if any(sums.values()) else {}


def read_run(run: str) -> RunRecord:
    """The run in RUN, a path or URI; raises ValueError where there is none, or it cannot be read."""
    try:
        return read_record(read_config(run))
    except (OSError, JSONDecodeError) as error:
        raise ValueError(f"cannot read the run {run}: {storage.first_line(error)}") from error


def read_record(config: TrainConfig) -> RunRecord:
    """What the run of `config` has left."""
    run = run_uri(config)
    bad = read_quarantine(storage.join(run, "quarantine.jsonl"))
    return RunRecord(
        config,
        read_metrics(run),
        left_out=Counter(image.reason for image in bad),
        views=storage.read(storage.join(run, "views.png")),
    )
