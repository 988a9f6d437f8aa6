"""`diptych demo`: train on handwritten digits from an S3 server on this machine."""

import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.digits import scattered_digits
from cluster.objectstore import s3_server
from cluster.train import run_training
from pipelines.shards import write_shards
from pipelines.storage.scratch import scratch_folder
from training.config import TrainConfig, shipped_config
from training.evaluation.certainty import shown

_BUCKET = "diptych-demo"
_TRAIN_IMAGES, _TEST_IMAGES = 4096, 1024
_SHARD_ROWS, _GROUP_ROWS = 1024, 256


def run_demo(output: str) -> None:
    """Make the images, train, and print the accuracy before and after."""
    with (
        scratch_folder() as folder,
        s3_server(Path(folder), bucket=_BUCKET),
    ):
        train, test = f"s3://{_BUCKET}/train", f"s3://{_BUCKET}/test"
        for uri, count, held_out in ((train, _TRAIN_IMAGES, False), (test, _TEST_IMAGES, True)):
            images = scattered_digits(count, held_out=held_out, seed=0)
            write_shards(images, uri, rows_per_shard=_SHARD_ROWS, rows_per_group=_GROUP_ROWS)
            print(f"{count:,} images packed into {uri}")
        config = _config(train, test, output)
        metrics = run_training(config)
    _print_accuracies(metrics.having("knn_top1"))


def _config(train: str, test: str, output: str) -> TrainConfig:
    values = tomllib.loads(shipped_config("demo").read_text())
    data = values.pop("data") | {"train": train, "test": test}
    return TrainConfig(**values, data=data, output=output, name=time.strftime("demo-%Y%m%d-%H%M%S"))


def _print_accuracies(evaluations: Sequence[dict[str, Any]]) -> None:
    print("\nkNN accuracy on held-out digits (chance is 10 %)")
    for label, line, key in (
        ("raw pixels", evaluations[0], "knn_top1_pixels"),
        ("untrained encoder", evaluations[0], "knn_top1"),
        ("trained encoder", evaluations[-1], "knn_top1"),
    ):
        print(f"  {label:<18} {shown(line, key):>13}  {'#' * round(50 * line[key])}")
