"""Jobs of a shard each cover every row once; a shard keeps the very bytes, and notes what it left out."""

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import fs

from pipelines.config import DataConfig
from pipelines.index import Index, build_index
from pipelines.packing import (
    ShardJob,
    Sizes,
    all_readings,
    finished_shards,
    mean_bytes,
    pack_shard,
    shard_jobs,
    spread,
)
from pipelines.quarantine import decode
from pipelines.reader import read_pieces
from pipelines.shards import class_names, write_shards


def _packed(jobs: list[ShardJob], data: DataConfig, dest: Path) -> list[dict]:
    """The rows of the shards that the jobs write, in the order of their names."""
    for job in jobs:
        pack_shard(job, data, str(dest), rows_per_group=5, classes=["a", "b"])
    return [row for path in sorted(dest.iterdir()) for row in pq.read_table(path).to_pylist()]


def test_shards_hold_the_sources_bytes_in_its_order(
    index: Index, data: DataConfig, encoded: list[bytes], tmp_path: Path
):
    jobs = list(shard_jobs(index, 15))
    assert [job.number for job in jobs] == [0, 1, 2]
    rows = _packed(jobs, data, tmp_path)
    assert [row["image"] for row in rows] == encoded
    assert [(row["label"], row["key"]) for row in rows] == [
        (n % 10, f"image {n}") for n in range(len(encoded))
    ]
    files = [pq.ParquetFile(path).metadata for path in sorted(tmp_path.iterdir())]
    assert [[file.row_group(n).num_rows for n in range(file.num_row_groups)] for file in files] == [
        [5, 5, 5], [5, 5, 5], [5, 2],
    ]  # fmt: skip
    assert class_names(fs.LocalFileSystem(), str(tmp_path / "00000.parquet")) == ("a", "b")


def test_an_image_that_pillow_decodes_for_training_is_packed_as_it_is(pngs: list[bytes], tmp_path: Path):
    out = io.BytesIO()
    Image.open(io.BytesIO(pngs[0])).save(out, "GIF")
    write_shards([(out.getvalue(), 0, "gif")], str(tmp_path / "in"), rows_per_shard=1, rows_per_group=1)
    data = DataConfig(train=str(tmp_path / "in"))
    index = build_index(data.train, data)
    (row,) = _packed(list(shard_jobs(index, 1)), data, tmp_path / "out")
    assert row["image"] == out.getvalue()
    (read,) = read_pieces(next(iter(all_readings(index, 1))), data)["image"].to_pylist()
    with Image.open(io.BytesIO(read)) as png, Image.open(io.BytesIO(out.getvalue())) as gif:
        assert png.format == "PNG"
        assert png.tobytes() == gif.convert("RGB").tobytes()


def test_readings_cover_every_row_once_and_no_fragment_twice(index: Index):
    for readings in (
        list(all_readings(index, 3)),
        [reading for job in shard_jobs(index, 1000, window_rows=3) for reading in job.readings],
    ):
        pieces = [piece for reading in readings for piece in reading.pieces.to_pylist()]
        assert [piece["stop"] - piece["start"] for piece in pieces] == index.rows.tolist()
        assert [piece["first_sample"] for piece in pieces] == index.first_sample.tolist()


def test_bad_images_are_left_out_and_found_again_in_the_finished_shard(tmp_path: Path):
    rows = [(b"no image", 0, "first")] * 2
    write_shards(rows, str(tmp_path / "in"), rows_per_shard=2, rows_per_group=2)
    data = DataConfig(train=str(tmp_path / "in"))
    (job,) = shard_jobs(build_index(data.train, data), 10)
    report = pack_shard(job, data, str(tmp_path / "out"), rows_per_group=5, classes=())
    assert report["images"].to_pylist() == [0]
    bad = decode(report["bad"][0].as_py().encode())
    assert [(image.key, image.reason) for image in bad] == [
        ("first", "no image in a known format, or truncated")
    ] * 2
    assert finished_shards(str(tmp_path / "out")) == {0: report}


def test_nothing_is_finished_where_nothing_is(tmp_path: Path):
    assert finished_shards(str(tmp_path / "none")) == {}


@pytest.mark.parametrize(
    ("bytes_per_image", "given", "expected"),
    [
        # Bytes per image, and the rows per shard, group and part of a million images.
        (100_000, {}, (1328, 83, 2684)),
        (1_000, {}, (134_144, 1024, 15_625)),  # No more rows than a window has; 64 parts.
        (50_000_000, {}, (3, 1, 5)),
        (100_000, {"shard": 10}, (10, 10, 2684)),
        (100_000, {"group": 7, "part": 9}, (1344, 7, 9)),
    ],
)
def test_sizes_follow_the_bytes_of_an_image_unless_given(
    bytes_per_image: float, given: dict[str, int], expected: tuple[int, int, int]
):
    sizes = Sizes.of(bytes_per_image, 1_000_000, **{"shard": None, "group": None, "part": None, **given})
    assert (sizes.rows_per_shard, sizes.rows_per_group, sizes.rows_per_part) == expected


@pytest.mark.parametrize(
    ("images", "bytes_per_image", "parts"), [(137_000, 1_000, 64), (50_000, 2_500, 25), (10_000, 110_000, 64)]
)
def test_small_images_are_read_in_as_many_parts_as_a_large_cluster_has_cores(
    images: int, bytes_per_image: float, parts: int
):
    sizes = Sizes.of(bytes_per_image, images, shard=None, group=None, part=None)
    assert -(-images // sizes.rows_per_part) == parts


def test_a_sample_lies_evenly_over_the_fragments(index: Index, data: DataConfig, encoded: list[bytes]):
    reading = spread(index, 10)
    assert len(set(reading.pieces["path"].to_pylist())) > 1
    table = read_pieces(reading, data)
    assert len(table) >= 10
    assert mean_bytes(table) == sum(map(len, table["image"].to_pylist())) / len(table)
    assert len(read_pieces(spread(index, 1000), data)) == len(encoded)


@pytest.mark.parametrize("key", ["../../x", "/x", "..", "a/../../../x\x00", "C:\\x", ""])
def test_a_key_is_data_and_no_path(key: str, pngs: list[bytes], tmp_path: Path):
    images = [(pngs[0], 0, key), (b"no image", 1, f"{key}-bad")]
    write_shards(images, str(tmp_path / "in"), rows_per_shard=2, rows_per_group=2)
    data = DataConfig(train=str(tmp_path / "in"))
    (job,) = shard_jobs(build_index(data.train, data), 2)
    before = set(tmp_path.rglob("*"))
    report = pack_shard(job, data, str(tmp_path / "deep" / "out"), rows_per_group=5, classes=[])
    assert set(tmp_path.rglob("*")) - before == {
        tmp_path / "deep", tmp_path / "deep" / "out", tmp_path / "deep" / "out" / "00000.parquet"
    }  # fmt: skip
    (row,) = pq.read_table(tmp_path / "deep" / "out" / "00000.parquet").to_pylist()
    assert row["key"] == key
    (bad,) = decode(report["bad"][0].as_py().encode())
    assert bad.key == f"{key}-bad"
