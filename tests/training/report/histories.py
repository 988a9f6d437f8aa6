"""The config and the lines of metrics that the tests of a report's parts share."""

from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.config import DataConfig
from training.config import EncoderConfig, TrainConfig
from training.metrics_table import Metrics
from training.report.history import RunHistory

CONFIG = TrainConfig(
    data=DataConfig(train="s3://bucket/<script>alert('1')</script>&more"),
    name="run-7",
    encoder=EncoderConfig(name="resnet20"),
)
STEPS = [
    {
        "step": step,
        "epoch": 1,
        "loss": 6.0 - step / 2,
        "learning_rate": 0.1,
        "images_per_second": 1000.0 * step,
    }
    for step in range(1, 6)
]
BEFORE = {"step": 0, "epoch": 0, "knn_top1": 0.30126, "knn_top1_pixels": 0.2502}
AFTER = {"step": 5, "epoch": 1, "knn_top1": 0.81249}


def history(lines: Iterable[Mapping[str, Any]], config: TrainConfig = CONFIG, **others: Any) -> RunHistory:
    """That of a run with these lines of metrics."""
    return RunHistory(config, Metrics.of(lines), **others)
