from .config import (
    CheckpointConfig,
    EvaluationConfig,
    FinetuneConfig,
    OptimizerConfig,
    ProbeConfig,
    TrainConfig,
)
from .config.encoder import EncoderConfig
from .config.objective import BYOLConfig, ProjectorConfig, SimCLRConfig, SupervisedConfig
from .errors import RunError
from .export import Trained, read_trained
from .gather import Gather, LocalGather, ProcessGroupGather, mean_over_workers, rows_with_gradients
from .losses import byol_loss, nt_xent
from .metrics import read_metrics
from .models.encoders import Encoder, build_encoder
from .objectives import Objective
from .report import write_reports

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
