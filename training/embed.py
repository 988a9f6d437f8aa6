"""Features of images as Parquet shards, one job per shard."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float

from pipelines import storage
from pipelines.config import DataConfig
from pipelines.feed import Device, evaluation_views
from pipelines.images.decoding import screened
from pipelines.packing import ShardJob, good_rows, with_reasons, write_shard
from pipelines.reader import ahead, read_pieces
from pipelines.views import Views
from training.config import TrainConfig
from training.evaluation.finetune import load_encoder
from training.evaluation.knn import embed
from training.models.encoders import Encoder

# Rows of a shard's row groups: 8 MiB of resnet50's features.
_GROUP_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Embedder:
    """Writes shards of features to `dest`, from the encoder in the run's checkpoint of `step`.

    config: the run's; its output and name locate it. data: how images are read and cropped.
    """

    config: TrainConfig
    step: int
    data: DataConfig
    dest: str
    classes: tuple[str, ...] = ()

    def __call__(self, job: ShardJob) -> pa.Table:
        """Write key, path, label, class and feature of the job's good images; returns a packing.REPORT."""
        # The marker remains if an image crashes this process; the next attempt then tests the shard's images
        # in another process.
        begun = storage.join(self.dest, f"_begun-{job.number:05}")
        careful = storage.exists(begun)
        storage.write(begun, b"")
        rows, features = self._embed(job, careful)
        feature = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
        shard = good_rows(rows).append_column("feature", feature)
        labels = ["label"] if job.readings[0].has_labels else []
        if labels and self.classes:
            names = dict(enumerate(self.classes))
            column = [names.get(label) for label in shard["label"].to_pylist()]
            shard, labels = shard.append_column("class", pa.array(column, pa.string())), ["label", "class"]
        shard = shard.select(["key", "path", *labels, "feature"])
        report = write_shard(
            job.number, self.dest, shard, rows, rows_per_group=_GROUP_ROWS, classes=self.classes
        )
        storage.remove(begun)
        return report

    def _embed(self, job: ShardJob, careful: bool) -> tuple[pa.Table, Float[np.ndarray, "good dim"]]:
        """The job's rows without their images, and the features of the good ones."""
        seen: list[pa.Table] = []
        done: list[int] = []
        reasons: dict[int | None, str] = {}

        def tables() -> Iterator[pa.Table]:
            read = ahead(read_pieces(reading, self.data) for reading in job.readings)
            for table in screened(read, sys.maxsize, gpu=self._device.gpu) if careful else read:
                seen.append(table.drop_columns(["image"]))
                yield table

        def noted(views: Iterator[Views]) -> Iterator[Views]:
            for batch in views:
                done.extend(batch.samples.tolist())
                reasons.update({bad.sample: bad.reason for bad in batch.quarantined})
                yield batch

        views = evaluation_views(
            tables(), self.data, self._device, batch_size=self.config.evaluation.batch_size
        )
        (features,), _ = embed([self._encoder], noted(views), self._torch_device)
        rows = pa.concat_tables(seen)
        embedded = set(done)
        broken = {
            number: reasons[row["sample"]]
            for number, row in enumerate(rows.select(["sample", "bad"]).to_pylist())
            if row["bad"] is None and row["sample"] not in embedded
        }
        return with_reasons(rows, broken), features.cpu().numpy()

    @property
    def _device(self) -> Device:
        gpu = self._torch_device.type == "cuda"
        return Device(torch.get_num_threads(), torch.cuda.current_device() if gpu else None)

    @property
    def _torch_device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def _encoder(self) -> Encoder:
        encoder = load_encoder(self.config, self.step).to(self._torch_device)
        return encoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
