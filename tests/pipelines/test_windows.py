"""A window's rows depend only on the index and the config, and fit into the requested bytes."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import DataConfig
from pipelines.index import Index, build_index
from pipelines.plan import ROW_BYTES, Plan, lane_bytes, reading_rows, training_plan, window_rows


def _written(folder: Path, size: int, images: int = 500, compression: str = "snappy") -> Index:
    """The index of a Parquet file of images of `size` bytes that a codec makes much smaller, and of more."""
    table = pa.table(
        {"image": [bytes(size)] * images, "label": [0] * images, "other": [bytes(5000)] * images}
    )
    pq.write_table(table, folder / "a.parquet", use_dictionary=False, compression=compression)
    return build_index(str(folder), DataConfig(train=str(folder)))


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_an_images_bytes_are_those_that_it_takes_in_memory(tmp_path: Path, compression: str):
    index = _written(tmp_path, 1000, compression=compression)
    assert index.image_bytes == pytest.approx(1000, rel=0.02)


def test_an_images_bytes_are_known_of_structs_too(tmp_path: Path):
    rows = [{"image": {"bytes": bytes(3000), "path": "a"}, "label": 0}] * 400
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", use_dictionary=False)
    index = build_index(str(tmp_path), DataConfig(train=str(tmp_path)))
    assert index.image_bytes == pytest.approx(3000, rel=0.02)


def test_a_window_holds_as_many_images_as_its_bytes(tmp_path: Path):
    index = _written(tmp_path, 1000)
    data = DataConfig(train="", window_bytes=300_000)
    rows = window_rows(index, data)
    assert rows * (index.image_bytes + ROW_BYTES) <= 300_000 < (rows + 1) * (index.image_bytes + ROW_BYTES)
    assert window_rows(index, DataConfig(train="", window_bytes=1)) == 1
    assert window_rows(index, DataConfig(train="", window_rows=7)) == 7


def test_by_default_small_images_are_read_by_tens_of_thousands_and_large_ones_by_few(tmp_path: Path):
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    data = DataConfig(train="")
    assert window_rows(_written(tmp_path / "small", 2500), data) > 40_000
    assert window_rows(_written(tmp_path / "large", 4_000_000, images=3), data) < 40


def test_images_that_are_read_one_by_one_need_no_large_window(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(bytes(1000))
    index = build_index(str(tmp_path), DataConfig(train=str(tmp_path)))
    assert index.random_access
    assert window_rows(index, DataConfig(train="")) == 1024
    assert window_rows(index, DataConfig(train="", window_bytes=15_200)) == 10


def test_what_is_read_without_a_shuffle_is_no_more_than_needed(tmp_path: Path):
    index = _written(tmp_path, 1000)
    assert reading_rows(index, DataConfig(train="")) == 1024
    assert reading_rows(index, DataConfig(train="", window_rows=12)) == 12


def test_a_part_of_the_rows_and_a_kept_index_have_the_same_windows(tmp_path: Path):
    index, data = _written(tmp_path, 1000), DataConfig(train="", window_bytes=30_000)
    rows = window_rows(index, data)
    assert window_rows(index.only(np.arange(0, 500, 3)), data) == rows
    assert window_rows(Index.from_bytes(index.to_bytes()), data) == rows
    assert all(window_rows(part, data) == rows for part in index.split(0.2, 0))


@pytest.mark.parametrize("steps", [40, 41, 59, 60])
def test_windows_of_a_lane_are_alike(tmp_path: Path, steps: int):
    index = _written(tmp_path, 1000, images=steps * 8)
    data = DataConfig(train="", window_bytes=int(80.5 * (index.image_bytes + ROW_BYTES)))
    plan = training_plan(index, data, seed=0, lanes=2, batch_size=8)
    rows = [window.size for window in plan.windows(range(1), 0, steps)]
    assert sum(rows) == 4 * steps
    assert len(rows) == -(-steps // 20)
    assert max(rows) - min(rows) <= 4 * len(rows)
    assert max(rows) <= 80


def test_windows_of_so_many_images_as_asked_for_are_cut_as_they_always_were(tmp_path: Path):
    index = _written(tmp_path, 1000, images=400)
    plan = training_plan(index, DataConfig(train="", window_rows=150), seed=0, lanes=1, batch_size=10)
    assert [window.size for window in plan.windows(range(1), 0, 40)] == [150, 150, 100]


def test_a_lane_holds_no_more_than_it_has(tmp_path: Path):
    index = _written(tmp_path, 1000)
    plan = Plan(index.rows, 0, 2, 4, 10_000)
    assert lane_bytes(plan, index) == pytest.approx(250 * (1000 + ROW_BYTES), rel=0.02)
    assert lane_bytes(Plan(index.rows, 0, 2, 4, 10), index) == pytest.approx(
        10 * (1000 + ROW_BYTES), rel=0.02
    )


def test_an_index_that_was_kept_before_sizes_were_has_windows_too(tmp_path: Path):
    index = _written(tmp_path, 1000)
    table = pq.read_table(io.BytesIO(index.to_bytes()))
    about = (table.schema.metadata or {})[b"index"].replace(b', "image_bytes"', b', "unused"')
    assert b"unused" in about
    older = pa.Table.from_arrays(table.columns, names=table.column_names)
    content = io.BytesIO()
    about = about[: about.index(b', "unused"')] + b"}"
    pq.write_table(older.replace_schema_metadata({"index": about}), content)
    assert Index.from_bytes(content.getvalue()).image_bytes == 0.0
