"""A window's table has the exact bytes of its rows, the sizes as shown, and the labels."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.config import DataConfig
from pipelines.index import Index, build_index
from pipelines.plan import Piece, Plan
from pipelines.reader import SCHEMA, Reading, read_pieces, read_windows

_DATA = DataConfig(train="")


def _read(path: Path, table: pa.Table, start: int = 0) -> pa.Table:
    """The rows of a file with one row group, from `start` on."""
    pq.write_table(table, path)
    return read_pieces(Reading.of(build_index(str(path), _DATA), [Piece(0, start, len(table))]), _DATA)


def test_every_sample_has_its_own_bytes_and_label_under_its_number(
    index: Index, data: DataConfig, encoded: list[bytes]
):
    plan = Plan(rows=index.rows, seed=0, lanes=2, batch_size=4, window_rows=7)
    samples = []
    for table in read_windows(index, data, plan.windows(range(2), 0, plan.steps_per_epoch)):
        assert table.schema == SCHEMA
        for row in table.to_pylist():
            assert row["image"] == encoded[row["sample"]]
            assert row["label"] == row["sample"] % 10
            assert row["key"] == f"image {row['sample']}"
            samples.append(row["sample"])
    assert len(set(samples)) == len(samples) == 36


def test_rows_come_in_the_order_of_the_pieces(index: Index, data: DataConfig):
    read = read_pieces(Reading.of(index, [Piece(2, 0, 2), Piece(0, 1, 4)]), data)
    assert read["sample"].to_pylist() == [8, 9, 1, 2, 3]


def test_sizes_are_those_that_are_shown(
    tmp_path: Path, kinds: dict[str, bytes], decode: Callable[[bytes], Image.Image]
):
    table = _read(tmp_path / "kinds.parquet", pa.table({"image": list(kinds.values())}))
    shown = {kind: (decode(content).height, decode(content).width) for kind, content in kinds.items()}
    read = zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True)
    assert dict(zip(kinds, read, strict=True)) == shown


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_in_any_orientation_has_the_size_that_is_shown(
    orientation: int, tmp_path: Path, decode: Callable[[bytes], Image.Image]
):
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(out, "JPEG", exif=exif)
    (row,) = _read(tmp_path / "turned.parquet", pa.table({"image": [out.getvalue()]})).to_pylist()
    assert (row["width"], row["height"]) == decode(out.getvalue()).size


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_a_struct_of_bytes_and_path_is_read_as_its_bytes(
    tmp_path: Path, pngs: list[bytes], kind: pa.DataType
):
    rows = [{"bytes": content, "path": "some.png"} for content in pngs]
    column = pa.array(rows, pa.struct([("bytes", kind), ("path", pa.string())]))
    table = _read(tmp_path / "struct.parquet", pa.table({"image": column, "label": list(range(len(rows)))}))
    assert table.schema == SCHEMA
    assert table["image"].to_pylist() == pngs


def test_labels_that_are_absent_are_minus_one(tmp_path: Path, pngs: list[bytes]):
    table = _read(tmp_path / "unlabelled.parquet", pa.table({"image": pngs}))
    assert set(table["label"].to_pylist()) == {-1}


def test_a_label_that_is_null_is_minus_one(tmp_path: Path, pngs: list[bytes]):
    images = pa.table({"image": pngs[:3], "label": pa.array([4, None, 5], pa.int64())})
    assert _read(tmp_path / "half.parquet", images)["label"].to_pylist() == [4, -1, 5]


@pytest.mark.parametrize("kind", [pa.int32(), pa.uint8(), pa.int64()])
def test_labels_of_any_whole_number_type_are_read(tmp_path: Path, pngs: list[bytes], kind: pa.DataType):
    table = _read(tmp_path / "labels.parquet", pa.table({"image": pngs[:2], "label": pa.array([7, 3], kind)}))
    assert table["label"].to_pylist() == [7, 3]


def test_labels_that_are_no_numbers_are_refused_by_name(tmp_path: Path, pngs: list[bytes]):
    with pytest.raises(ValueError, match=r"named\.parquet"):
        _read(tmp_path / "named.parquet", pa.table({"image": pngs[:2], "label": ["cat", "dog"]}))


@pytest.mark.parametrize("content", [b"no image at all", b"", None])
def test_a_row_that_is_no_image_is_marked_and_the_others_are_whole(
    tmp_path: Path, pngs: list[bytes], content: bytes | None
):
    rows = pngs[:5] + [content] + pngs[5:]
    read = _read(tmp_path / "bad.parquet", pa.table({"image": rows}), start=2)
    assert [row["image"] for row in read.to_pylist()] == [*pngs[2:5], None, *pngs[5:]]
    reasons = [row["bad"] for row in read.to_pylist()]
    assert [reason is None for reason in reasons] == [True] * 3 + [False] + [True] * (len(pngs) - 5)
    assert read["key"].to_pylist()[3] == "row group 0, row 5"


def test_an_image_column_without_bytes_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ValueError, match=r"numbers\.parquet"):
        _read(tmp_path / "numbers.parquet", pa.table({"image": [1, 2, 3]}))


@pytest.mark.parametrize("torn", [False, True], ids=["gone", "torn"])
def test_a_file_that_is_gone_or_torn_since_it_was_indexed_is_named(
    tmp_path: Path, pngs: list[bytes], torn: bool
):
    path = tmp_path / "later.parquet"
    pq.write_table(pa.table({"image": pngs}), path)
    index = build_index(str(path), _DATA)
    whole = path.read_bytes()
    path.unlink()
    if torn:
        path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read .*later\.parquet, row group 0: "):
        read_pieces(Reading.of(index, [Piece(0, 0, 3)]), _DATA)


def test_a_window_over_many_files_keeps_each_fragments_place(tmp_path: Path, pngs: list[bytes]):
    for shard in range(3):
        images = pngs[8 * shard : 8 * shard + 8]
        pq.write_table(pa.table({"image": images}), tmp_path / f"{shard}.parquet", row_group_size=3)
    index = build_index(str(tmp_path), _DATA)
    whole = [Piece(n, 0, int(rows)) for n, rows in enumerate(index.rows)]
    table = read_pieces(Reading.of(index, whole), _DATA)
    assert table["image"].to_pylist() == pngs
    np.testing.assert_array_equal(table["sample"], np.arange(len(pngs)))
