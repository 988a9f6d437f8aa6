"""Encoders, losses and the training loop, from one process to a Ray cluster."""

from typing import TYPE_CHECKING

from pipelines.exports import lazily
from training.config import (
    CheckpointConfig,
    EvaluationConfig,
    FinetuneConfig,
    OptimizerConfig,
    ProbeConfig,
    TrainConfig,
)
from training.config.encoder import EncoderConfig
from training.config.objective import BYOLConfig, ProjectorConfig, SimCLRConfig, SupervisedConfig
from training.errors import RunError

if TYPE_CHECKING:
    from training.export import Trained, read_trained
    from training.gather import (
        Gather,
        LocalGather,
        ProcessGroupGather,
        mean_over_workers,
        rows_with_gradients,
    )
    from training.losses import byol_loss, nt_xent
    from training.metrics import read_metrics
    from training.models.encoders import Encoder, build_encoder
    from training.objectives import Objective
    from training.report import write_reports

# What takes a second or more to import is imported once it is asked for.
__getattr__ = lazily(
    __name__,
    {
    "training.models.encoders": ("Encoder", "build_encoder"),
    "training.export": ("Trained", "read_trained"),
    "training.gather": (
        "Gather", "LocalGather", "ProcessGroupGather", "mean_over_workers", "rows_with_gradients",
    ),
    "training.losses": ("byol_loss", "nt_xent"),
    "training.metrics": ("read_metrics",),
    "training.objectives": ("Objective",),
    "training.report": ("write_reports",),
    },
)  # fmt: skip

__all__ = [
    "BYOLConfig",
    "CheckpointConfig",
    "Encoder",
    "EncoderConfig",
    "EvaluationConfig",
    "FinetuneConfig",
    "Gather",
    "LocalGather",
    "Objective",
    "OptimizerConfig",
    "ProbeConfig",
    "ProcessGroupGather",
    "ProjectorConfig",
    "RunError",
    "SimCLRConfig",
    "SupervisedConfig",
    "TrainConfig",
    "Trained",
    "build_encoder",
    "byol_loss",
    "mean_over_workers",
    "nt_xent",
    "read_metrics",
    "read_trained",
    "rows_with_gradients",
    "write_reports",
]
