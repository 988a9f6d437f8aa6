"""Which files are the data set: what is hidden, other systems' own files, partitions, and strays."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from cluster.cli.main import main
from pipelines import storage
from pipelines.config import DataConfig
from pipelines.formats.listing import find_files
from pipelines.index import Index, build_index
from pipelines.inspection import Survey, report
from pipelines.labels import read_labels
from pipelines.plan import Piece
from pipelines.reader import Reading, read_pieces

_DATA = DataConfig(train="")


def _touch(root: Path, *names: str, size: int = 10) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * size)


def _parquet(root: Path, name: str, **columns: list) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [b"a", b"b"], **columns}), root / name)


def _labels(index: Index) -> list[int]:
    """As the reader gives them, and as they are read without images."""
    pieces = [Piece(n, 0, int(rows)) for n, rows in enumerate(index.rows)]
    labels = read_pieces(Reading.of(index, pieces), _DATA)["label"].to_pylist()
    assert read_labels(index, _DATA, lambda done, of: None).tolist() == labels
    return labels


def test_hidden_folders_are_neither_classes_nor_images(tmp_path: Path) -> None:
    _touch(tmp_path, "cat/1.jpg", "cat/_DSC2.jpg", "dog/1.jpg", "_cat/1.jpg")
    _touch(tmp_path, ".ipynb_checkpoints/1.jpg", "cat/.ipynb_checkpoints/1.jpg", "__MACOSX/cat/1.jpg")
    _touch(tmp_path, ".Trash-1000/files/x.jpg", "cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "cat/._1.jpg")
    index = build_index(str(tmp_path), _DATA)
    assert index.classes == ("_cat", "cat", "dog")
    assert index.fragments["key"].to_pylist() == ["_cat/1.jpg", "cat/1.jpg", "cat/_DSC2.jpg", "dog/1.jpg"]


def test_a_data_set_may_lie_in_a_hidden_folder(tmp_path: Path) -> None:
    _touch(tmp_path, ".cache/images/cat/1.jpg", "__MACOSX/2.jpg")
    assert build_index(str(tmp_path / ".cache" / "images"), _DATA).classes == ("cat",)
    assert len(find_files(str(tmp_path / "__MACOSX" / "2.jpg")).places) == 1


def test_files_of_delta_and_spark_are_passed_over_as_pyarrow_does(tmp_path: Path) -> None:
    _parquet(tmp_path, "part-0.parquet", label=[0, 1])
    _parquet(tmp_path, "year=2021/part-1.parquet", label=[2, 3])
    for name in (
        "_delta_log/00010.checkpoint.parquet", "_temporary/0/part-2.parquet", "_metadata", "_common_metadata",
        "_metadata.parquet", ".part-0.parquet", ".hidden/part-3.parquet",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"other": [1]}), tmp_path / name)
    _touch(tmp_path, "_SUCCESS", "_delta_log/00000.json", size=0)
    index = build_index(str(tmp_path), _DATA)
    assert index.paths == ds.dataset(tmp_path, format="parquet").files  # pyright: ignore
    assert _labels(index) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [(["3", "1000"], [3, 3, 1000, 1000], ()), (["a%20b", "a"], [1, 1, 0, 0], ("a", "a b"))],
)
def test_partitions_give_parquet_files_their_labels_as_pyarrow_reads_them(
    values: list[str], labels: list[int], classes: tuple[str, ...], tmp_path: Path
) -> None:
    for number, value in enumerate(values):
        # Sorted by path, the order of `labels`.
        _parquet(tmp_path, f"split={number}/label={value}/0.parquet")
    index = build_index(str(tmp_path), _DATA)
    assert (index.classes, _labels(index)) == (classes, labels)
    theirs = pq.read_table(tmp_path)["label"].to_pylist()
    assert theirs == [classes[label] if classes else label for label in labels]
    assert Index.from_bytes(index.to_bytes()).fragments.equals(index.fragments)


def test_a_column_counts_before_partitions(tmp_path: Path) -> None:
    _parquet(tmp_path, "label=3/0.parquet", label=[7, 8])
    assert _labels(build_index(str(tmp_path), _DATA)) == [7, 8]


def test_partitions_give_folders_of_images_their_labels(tmp_path: Path) -> None:
    _touch(tmp_path, "split=train/label=7/1.jpg", "split=train/label=12/1.jpg")
    index = build_index(str(tmp_path), _DATA)
    assert (index.classes, sorted(_labels(index))) == ((), [7, 12])
    named = build_index(str(tmp_path), DataConfig(train="", label_column="split"))
    assert named.classes == ("train",)


@pytest.mark.parametrize("name", ["label=__HIVE_DEFAULT_PARTITION__/0.parquet", "0.parquet"])
def test_a_file_without_its_label_column_is_said_by_name(name: str, tmp_path: Path) -> None:
    _parquet(tmp_path, name)
    _parquet(tmp_path, "label=3/1.parquet")
    index = build_index(str(tmp_path), _DATA)
    assert (index.no_labels or "").startswith(f"{tmp_path}/")
    assert f"/{name} has no column 'label' (--data.label-column names another)" in (index.no_labels or "")
    assert set(_labels(index)) == {-1}
    assert report(index, Survey(), (), window_rows=4)["no_labels"] == index.no_labels


def test_a_label_beyond_what_a_number_holds_is_refused_by_name(tmp_path: Path) -> None:
    _parquet(tmp_path, "0.parquet", label=pa.array([1, 2**63], pa.uint64()))  # pyright: ignore
    index = build_index(str(tmp_path), _DATA)
    with pytest.raises(ValueError, match=r"0\.parquet: column 'label' has a label beyond int64: .*2"):
        _labels(index)


def test_an_image_outside_the_class_folders_is_said_by_name(tmp_path: Path) -> None:
    _touch(tmp_path, "cat/1.jpg", "dog/1.jpg", "cover.jpg")
    index = build_index(str(tmp_path), _DATA)
    assert index.no_labels == f"cover.jpg lies outside the class folders of {tmp_path}"
    with pytest.raises(ValueError, match=r"^evaluation needs labels, and cover\.jpg .*; give it one, or x$"):
        index.check_labels("evaluation", "x")


def test_a_stray_tar_hides_no_image_and_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _touch(tmp_path, *[f"{name}/{n}.jpg" for name in ("cat", "dog") for n in range(10)])
    _touch(tmp_path, "sample.tar", "old.tar.gz")
    index = build_index(str(tmp_path), _DATA)
    assert (index.layout, len(index.rows)) == ("folder", 20)
    assert index.passed_over == (
        f"{tmp_path}: 20 images; passed over: 1 tar (such as {tmp_path}/sample.tar), which {tmp_path}/*.tar "
        f"would give; passed over: 1 compressed tar (such as {tmp_path}/old.tar.gz); write them anew, "
        "uncompressed"
    )
    assert Index.from_bytes(index.to_bytes()).passed_over == index.passed_over
    assert find_files(f"{tmp_path}/*.tar").layout == "tar"
    with pytest.raises(SystemExit):
        main(["data", "preview", str(tmp_path), "-o", str(tmp_path / "sheet.png")])
    assert index.passed_over in capsys.readouterr().err


def test_a_picture_beside_shards_is_said(tmp_path: Path) -> None:
    for number in range(3):
        _parquet(tmp_path, f"{number}.parquet", label=[0, 1])
    _touch(tmp_path, "logo.png")
    index = build_index(str(tmp_path), _DATA)
    assert index.layout == "parquet"
    assert f"passed over: 1 image (such as {tmp_path}/logo.png), which" in (index.passed_over or "")


def test_where_files_and_bytes_disagree_the_user_is_asked(tmp_path: Path) -> None:
    _touch(tmp_path, *[f"{n}.jpg" for n in range(9)], "a.png")
    _touch(tmp_path, "backup.tar", size=1000)
    with pytest.raises(
        ValueError, match=r"1 tar \(such as .*/backup\.tar\) and 10 images .* give one alone, as "
    ):
        find_files(str(tmp_path))
    assert find_files(f"{tmp_path}/*.jpg").passed_over is None
    assert len(find_files(f"{tmp_path}/*.jpg").places) == 9


def _index_of_three(tmp_path: Path) -> Index:
    _touch(tmp_path, "cat/1.jpg", "cat/2.jpg", "dog/1.jpg")
    return Index.from_bytes(build_index(str(tmp_path), _DATA).to_bytes())


def test_files_that_are_there_as_they_were_pass_and_new_ones_are_no_matter(tmp_path: Path) -> None:
    index = _index_of_three(tmp_path)
    _touch(tmp_path, "cat/3.jpg", "more.tar")
    index.check_unchanged()
    for part in index.split(0.4, seed=0):
        part.check_unchanged()


def test_a_file_that_has_gone_is_named(tmp_path: Path) -> None:
    index = _index_of_three(tmp_path)
    (tmp_path / "cat" / "2.jpg").unlink()
    with pytest.raises(
        ValueError, match=r"cat/2\.jpg is gone; restore it, or start a new run for the changed images"
    ):
        index.check_unchanged()


def test_a_file_of_another_size_is_named_with_both(tmp_path: Path) -> None:
    index = _index_of_three(tmp_path)
    _touch(tmp_path, "dog/1.jpg", size=11)
    with pytest.raises(
        ValueError, match=r"dog/1\.jpg is another than .*: 10 bytes of 2.* UTC then, 11 bytes"
    ):
        index.check_unchanged()


def test_a_file_that_was_written_anew_with_as_many_bytes_is_named(tmp_path: Path) -> None:
    index = _index_of_three(tmp_path)
    before = (tmp_path / "cat" / "1.jpg").stat()
    os.utime(tmp_path / "cat" / "1.jpg", ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))
    with pytest.raises(ValueError, match=r"cat/1\.jpg is another than when its images were listed"):
        index.check_unchanged()


@pytest.mark.parametrize("pattern", ["", "/part-*.parquet"])
def test_objects_in_a_bucket_are_compared_too(bucket: str, tmp_path: Path, pattern: str) -> None:
    place = f"{bucket}/changed{len(pattern)}"
    for name in ("part-0", "part-1"):
        _parquet(tmp_path, f"{name}.parquet", label=[0, 1])
        storage.write(f"{place}/{name}.parquet", (tmp_path / f"{name}.parquet").read_bytes())
    index = build_index(place + pattern, _DATA)
    index.check_unchanged()
    _parquet(tmp_path, "other.parquet", label=[0, 1], more=["a", "b"])
    storage.write(f"{place}/part-1.parquet", (tmp_path / "other.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"part-1\.parquet is another than when its images were listed"):
        index.check_unchanged()


def test_folders_with_a_label_beside_ones_without_give_none_and_the_first_is_named(tmp_path: Path) -> None:
    _touch(tmp_path, "label=1/1.jpg", "label=__HIVE_DEFAULT_PARTITION__/2.jpg", "label=3/3.jpg")
    index = build_index(str(tmp_path), _DATA)
    assert index.no_labels == (
        f"label=__HIVE_DEFAULT_PARTITION__/2.jpg lies outside the class folders of {tmp_path}"
    )


def test_every_kind_of_image_that_is_read_is_listed(tmp_path: Path) -> None:
    names = ["a.pgm", "b.PBM", "c.pnm", "d.j2k", "e.heif", "f.dib"]
    _touch(tmp_path, *names)
    assert [Path(path).name for path in build_index(str(tmp_path), _DATA).paths] == names


def test_a_name_that_is_not_utf8_is_said(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"the name of .*caf\\xe9\.jpg is not UTF-8; rename the file"):
        build_index(str(tmp_path), _DATA)


@pytest.mark.parametrize("keys", [[["a"], ["b"]], [{"x": 1}, {"x": 2}], [b"\xe9", b"\xff"]])
def test_keys_that_are_no_text_are_the_rows_numbers(tmp_path: Path, keys: list) -> None:
    _parquet(tmp_path, "a.parquet", key=keys)
    index = build_index(str(tmp_path), _DATA)
    rows = read_pieces(Reading.of(index, [Piece(0, 0, 2)]), _DATA)
    assert rows["key"].to_pylist() == ["row group 0, row 0", "row group 0, row 1"]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array([b"a"]), pa.array([b"b"])], names=["image", "image"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has 2 columns 'image'; write it again"):
        build_index(str(tmp_path), _DATA)
