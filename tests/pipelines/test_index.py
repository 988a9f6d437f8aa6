"""An index lists every row group in the order of the paths, and its errors name what is wrong."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import DataConfig
from pipelines.index import Index, build_index
from pipelines.plan import evaluation_windows
from pipelines.reader import read_windows

_DATA = DataConfig(train="")


def _write(path: Path, rows: int, *, group: int = 4, **columns: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = columns or {"image": [b"image"] * rows, "label": list(range(rows))}
    pq.write_table(pa.table(columns), path, row_group_size=group)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files side by side and one below, with 5, 4 and 9 rows; the path has a space."""
    folder = tmp_path / "a folder"
    _write(folder / "train-1.parquet", 5)
    _write(folder / "train-0.parquet", 4)
    _write(folder / "below" / "test-0.parquet", 9)
    (folder / "notes.txt").write_text("no images here")
    return folder


def _names(index: Index) -> list[str]:
    return [Path(path).name for path in index.paths]


def test_a_folder_is_read_to_the_bottom_sorted_by_path(folder: Path):
    index = build_index(str(folder), _DATA)
    assert _names(index) == ["test-0.parquet", "train-0.parquet", "train-1.parquet"]
    assert index.rows.tolist() == [4, 4, 1, 4, 4, 1]
    assert [Path(path).name for path in index.fragments["path"].to_pylist()] == [
        "test-0.parquet", "test-0.parquet", "test-0.parquet", "train-0.parquet", "train-1.parquet",
        "train-1.parquet",
    ]  # fmt: skip
    assert index.fragments["row_group"].to_pylist() == [0, 1, 2, 0, 0, 1]


def test_samples_are_numbered_through_all_files(folder: Path):
    assert build_index(str(folder), _DATA).first_sample.tolist() == [0, 4, 8, 9, 13, 17]


def test_one_file_can_be_given(folder: Path):
    assert _names(build_index(str(folder / "train-1.parquet"), _DATA)) == ["train-1.parquet"]


@pytest.mark.parametrize("form", ["{}/train-*.parquet", "{}/t*-*.parquet", "{}/*1.parquet", "{}/below/*"])
def test_a_pattern_picks_the_files_that_the_shell_would(folder: Path, form: str):
    pattern = form.format(folder)
    expected = sorted(str(path) for path in folder.glob(form.removeprefix("{}/")) if path.is_file())
    assert build_index(pattern, _DATA).paths == expected


def test_a_pattern_in_a_folder_with_brackets_is_found(tmp_path: Path):
    _write(tmp_path / "run[1]" / "train-0.parquet", 4)
    assert _names(build_index(f"{tmp_path}/run[1]/train-*.parquet", _DATA)) == ["train-0.parquet"]


def test_a_file_uri_gives_what_the_path_gives(tmp_path: Path):
    _write(tmp_path / "train-0.parquet", 4)
    for suffix in ("", "/train-*.parquet", "/train-0.parquet"):
        index = build_index(f"file://{tmp_path}{suffix}", _DATA)
        assert index.paths == build_index(f"{tmp_path}{suffix}", _DATA).paths
        assert index.rows.tolist() == [4]


def test_a_relative_path_starts_from_the_working_folder(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    assert build_index("below", _DATA).paths == build_index(str(folder / "below"), _DATA).paths


def test_there_are_labels_only_where_every_file_has_them(folder: Path):
    assert build_index(str(folder), _DATA).has_labels
    _write(folder / "unlabelled.parquet", 1, image=[b"image"])
    assert not build_index(str(folder), _DATA).has_labels


def test_columns_can_be_named(tmp_path: Path):
    _write(tmp_path / "data.parquet", 1, jpeg=[b"image"], animal=[3])
    data = DataConfig(train="", image_column="jpeg", label_column="animal")
    assert build_index(str(tmp_path), data).has_labels


def test_a_file_without_rows_has_no_fragment_of_its_own(tmp_path: Path):
    _write(tmp_path / "0.parquet", 0, image=pa.array([], pa.binary()))
    _write(tmp_path / "1.parquet", 3)
    index = build_index(str(tmp_path), _DATA)
    assert index.rows.sum() == 3
    assert _names(index) == ["1.parquet"]


def test_progress_is_told_after_each_file(folder: Path):
    told = []
    build_index(str(folder), _DATA, lambda done, files: told.append((done, files)))
    assert sorted(told) == [(1, 3), (2, 3), (3, 3)]


def _missing(folder: Path) -> str:
    return str(folder / "nowhere")


def _missing_pattern(folder: Path) -> str:
    return str(folder / "nowhere" / "*.parquet")


def _without_parquet(folder: Path) -> str:
    (folder / "empty").mkdir()
    return str(folder / "empty")


def _without_match(folder: Path) -> str:
    return str(folder / "val-*.parquet")


def _without_rows(folder: Path) -> str:
    _write(folder / "none" / "0.parquet", 0, image=pa.array([], pa.binary()))
    return str(folder / "none")


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (_missing, "does not exist"),
        (_missing_pattern, "does not exist"),
        (_without_parquet, "holds no image: no file there is Parquet, a tar or an image"),
        (_without_match, "holds no image: no file there matches"),
        (_without_rows, "holds no image: its 1 files have none"),
    ],
)
def test_a_place_without_images_is_refused_by_name(folder: Path, place: Callable[[Path], str], reason: str):
    uri = place(folder)
    with pytest.raises(ValueError, match=re.escape(reason)) as refused:
        build_index(uri, _DATA)
    assert uri.partition("*")[0].rstrip("/") in str(refused.value)


def test_a_file_without_the_image_column_is_refused_with_the_columns_that_it_has(folder: Path):
    _write(folder / "other.parquet", 2, picture=[b"a", b"b"], label=[0, 1])
    with pytest.raises(
        ValueError, match=r"other\.parquet holds no image: no column 'image' among picture, label"
    ):
        build_index(str(folder), _DATA)


def test_a_torn_file_is_refused_by_name(folder: Path):
    whole = (folder / "train-0.parquet").read_bytes()
    (folder / "torn.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read .*torn\.parquet: "):
        build_index(str(folder), _DATA)


def test_an_unknown_scheme_is_refused_with_those_that_work():
    with pytest.raises(ValueError, match=r"cannot open ftp://host/images: .*; use a path, file://, s3://"):
        build_index("ftp://host/images", _DATA)


def test_a_large_index_is_stored_and_comes_back_as_it_was_and_in_one_piece():
    count = 300_000
    rows = np.full(count, 7)
    fragments = pa.table(
        {
            "path": [f"bucket/{number:06}.parquet" for number in range(count)],
            "rows": rows,
            "row_group": np.zeros(count, np.int64),
            "first_sample": np.cumsum(rows) - rows,
        }
    )
    index = Index("s3://bucket", "parquet", fragments, classes=("cat", "dog"))
    loaded = Index.from_bytes(index.to_bytes())
    assert loaded.fragments.equals(fragments)
    assert (loaded.uri, loaded.layout, loaded.has_labels, loaded.classes) == (
        "s3://bucket", "parquet", True, ("cat", "dog"),
    )  # fmt: skip
    # Columns in several pieces of one memory would be pickled, memory and all, once for each.
    assert len(pickle.dumps(loaded)) < 1.01 * fragments.nbytes


def test_a_split_keeps_the_samples_numbers_and_reads_each_row_in_one_part(index: Index, data: DataConfig):
    total = int(index.rows.sum())
    kept, held_out = index.split(0.25, seed=1)
    assert [part.rows.sum() for part in (kept, held_out)] == [total - round(total / 4), round(total / 4)]
    (table,) = read_windows(index, data, evaluation_windows(index.rows, 0, 1, window_rows=total))
    images = dict(zip(table["sample"].to_pylist(), table["image"].to_pylist(), strict=True))
    found = {}
    for part in (kept, held_out):
        windows = evaluation_windows(part.rows, 0, 1, window_rows=7, rows_read=part.rows_read)
        rows = pa.concat_tables(read_windows(part, data, windows))
        assert rows["sample"].to_pylist() == part.samples.tolist()
        found |= dict(zip(rows["sample"].to_pylist(), rows["image"].to_pylist(), strict=True))
    assert found == images


def test_a_split_that_would_leave_no_image_is_refused(index: Index):
    with pytest.raises(ValueError, match="images, too few to hold out 100% of them and train on one image"):
        index.split(1.0, seed=0)
