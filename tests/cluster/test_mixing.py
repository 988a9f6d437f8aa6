"""A run says what its windows take and how well its batches are mixed, and warns with the way out."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.datasets import say_mixing
from pipelines.config import DataConfig
from pipelines.index import Index, build_index
from pipelines.shards import write_shards
from training.config import EncoderConfig, TrainConfig

_IMAGES = 2000


def _listed(folder: Path, *, by_class: bool) -> tuple[Index, TrainConfig]:
    """Images of ten classes, in the order of their classes or in turns."""
    labels = (n * 10 // _IMAGES if by_class else n % 10 for n in range(_IMAGES))
    rows = ((b"image", label, str(n)) for n, label in enumerate(labels))
    write_shards(rows, str(folder), rows_per_shard=_IMAGES, rows_per_group=100)
    config = _config(str(folder), window_rows=50)
    return build_index(str(folder), config.data), config


def _config(uri: str, workers: int | str | None = None, **data: Any) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(train=uri, recipe="simclr-cifar", **data),
        encoder=EncoderConfig(name="resnet8"), batch_size=40, lanes=4, workers=workers,
    )  # fmt: skip


def test_images_stored_by_class_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index, config = _listed(tmp_path, by_class=True)
    mixing = say_mixing(config, index)
    assert mixing
    assert mixing.classes < 5
    shown = capsys.readouterr()
    assert "classes among 40 images of a batch: " in shown.out
    assert (
        "are stored by class, so batches are poorly mixed: shuffle them with `diptych data pack`" in shown.err
    )


def test_images_in_turns_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index, config = _listed(tmp_path, by_class=False)
    assert say_mixing(config, index)
    assert not capsys.readouterr().err


def test_what_is_not_measured_is_said_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    for number in range(40):
        (tmp_path / "folder" / f"{number}.png").write_bytes(b"image")
    unlabelled = pa.table({"image": [b"image"] * 40})
    pq.write_table(unlabelled, tmp_path / "unlabelled.parquet", row_group_size=10)
    for name, said in (("folder", "by a full shuffle"), ("unlabelled.parquet", "unknown")):
        config = _config(str(tmp_path / name))
        assert say_mixing(config, build_index(config.data.train, config.data)) is None
        shown = capsys.readouterr()
        assert said in shown.out
        assert not shown.err


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        (None, "23 MiB in all"),
        (1, "23 MiB a worker"),
        (4, "6 MiB a worker"),
        ("1:2", "12 to 23 MiB a worker"),
    ],
)
def test_the_memory_of_windows_is_told_for_the_workers_there_may_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int | str | None, said: str
) -> None:
    rows = ((n.to_bytes(4, "big") * 5_000, 0, str(n)) for n in range(1200))
    write_shards(rows, str(tmp_path), rows_per_shard=400, rows_per_group=40)
    config = _config(str(tmp_path), workers, window_bytes=10_000_000)
    say_mixing(config, build_index(str(tmp_path), config.data))
    assert said in capsys.readouterr().out
