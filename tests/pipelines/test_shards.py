"""Shards hold the exact bytes of their images, in shards and row groups of the requested sizes."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.shards import EncodedImage, write_shards


def _images(encoded: list[bytes]) -> Iterator[EncodedImage]:
    return ((content, n % 10, f"image {n}") for n, content in enumerate(encoded))


def test_bytes_labels_and_keys_are_kept_in_order(tmp_path: Path, encoded: list[bytes]):
    assert write_shards(_images(encoded), str(tmp_path), rows_per_shard=10, rows_per_group=4) == 4
    rows = [row for path in sorted(tmp_path.iterdir()) for row in pq.read_table(path).to_pylist()]
    assert [(row["image"], row["label"], row["key"]) for row in rows] == list(_images(encoded))


def test_shards_and_row_groups_have_the_rows_asked_for(tmp_path: Path, encoded: list[bytes]):
    write_shards(_images(encoded), str(tmp_path), rows_per_shard=10, rows_per_group=4)
    groups = {}
    for path in sorted(tmp_path.iterdir()):
        metadata = pq.read_metadata(path)
        groups[path.name] = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    full = [4, 4, 2]
    last = {"00003.parquet": [4, 3]}
    assert groups == {f"0000{shard}.parquet": full for shard in range(3)} | last


def test_no_images_make_no_shard(tmp_path: Path):
    assert write_shards([], str(tmp_path), rows_per_shard=10, rows_per_group=4) == 0
    assert list(tmp_path.iterdir()) == []


def test_shards_are_whole_where_the_images_break_off(tmp_path: Path, encoded: list[bytes]):
    def broken() -> Iterator[EncodedImage]:
        yield from list(_images(encoded))[:25]
        raise OSError("the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        write_shards(broken(), str(tmp_path), rows_per_shard=10, rows_per_group=4)
    assert [pq.read_metadata(path).num_rows for path in sorted(tmp_path.iterdir())] == [10, 10]
