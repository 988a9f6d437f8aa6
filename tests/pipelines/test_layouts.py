"""The same images as Parquet, as a folder and as tars give the same rows, on every storage."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.config import DataConfig
from pipelines.index import Index, build_index
from pipelines.plan import Piece, Plan
from pipelines.reader import Reading, read_pieces, read_windows

_DATA = DataConfig(train="")
_CLASSES = ("ant", "bee", "cat")

# (key, label, content) of each image, in the order of an index.
Images = list[tuple[str, int, bytes]]


@pytest.fixture(scope="module")
def images(pngs: list[bytes]) -> Images:
    return [
        (f"{_CLASSES[label]}/{number:02}", label, pngs[8 * label + number])
        for label in range(3)
        for number in range(8)
    ]


def _tar(images: Images, *, labels: bool = True) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for key, label, content in images:
            parts = {".json": b"{}", ".png": content} | ({".cls": str(label).encode()} if labels else {})
            for ending, part in parts.items():
                member = tarfile.TarInfo(key + ending)
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
    return out.getvalue()


def _write_folder(images: Images, uri: str) -> None:
    for key, _, content in images:
        storage.write(f"{uri}/{key}.png", content)
    storage.write(f"{uri}/ant/notes.txt", b"no image")
    storage.write(f"{uri}/ant/.hidden.png", b"no image")


def _write_tars(images: Images, uri: str) -> None:
    for shard in range(3):
        storage.write(f"{uri}/{shard:03}.tar", _tar(images[8 * shard : 8 * shard + 8]))


def _write_parquet(images: Images, uri: str) -> None:
    keys, labels, contents = zip(*images, strict=True)
    out = io.BytesIO()
    pq.write_table(pa.table({"image": contents, "label": labels, "key": keys}), out, row_group_size=5)
    storage.write(f"{uri}/0.parquet", out.getvalue())


_WRITERS = {"folder": _write_folder, "tar": _write_tars, "parquet": _write_parquet}


def _all(index: Index) -> list[dict]:
    pieces = [Piece(n, 0, int(rows)) for n, rows in enumerate(index.rows)]
    return read_pieces(Reading.of(index, pieces), _DATA).to_pylist()


@pytest.fixture(params=["local", "bucket", "gcs_bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder on this machine, on a real S3 server and on a real GCS server."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue(request.param)


@pytest.mark.parametrize("layout", list(_WRITERS))
def test_every_row_has_its_bytes_label_and_key(layout: str, place: str, images: Images):
    uri = f"{place}/layouts/{layout}"
    _WRITERS[layout](images, uri)
    index = build_index(uri, _DATA)
    assert (index.layout, index.has_labels, int(index.rows.sum())) == (layout, True, len(images))
    rows = _all(index)
    assert [(row["key"].removesuffix(".png"), row["label"], row["image"]) for row in rows] == images
    assert [row["sample"] for row in rows] == list(range(len(images)))


@pytest.mark.parametrize("layout", list(_WRITERS))
def test_an_epoch_of_windows_gives_every_row_its_own_bytes(layout: str, tmp_path: Path, images: Images):
    _WRITERS[layout](images, str(tmp_path))
    index = build_index(str(tmp_path), _DATA)
    plan = Plan(index.rows, seed=0, lanes=2, batch_size=4, window_rows=5)
    read = pa.concat_tables(read_windows(index, _DATA, plan.windows(range(2), 0, plan.steps_per_epoch)))
    assert sorted(read["sample"].to_pylist()) == list(range(len(images)))
    for row in read.to_pylist():
        assert row["image"] == images[row["sample"]][2]


@pytest.mark.parametrize("layout", list(_WRITERS))
def test_an_index_comes_back_from_its_bytes(layout: str, tmp_path: Path, images: Images):
    _WRITERS[layout](images, str(tmp_path))
    index = build_index(str(tmp_path), _DATA)
    again = Index.from_bytes(index.to_bytes())
    assert again.fragments.equals(index.fragments)
    assert (again.uri, again.layout, again.has_labels, again.classes) == (
        index.uri, index.layout, index.has_labels, index.classes,
    )  # fmt: skip
    assert _all(again) == _all(index)


def test_a_folders_classes_are_its_first_folders_by_name(tmp_path: Path, images: Images):
    _write_folder(images, str(tmp_path))
    assert build_index(str(tmp_path), _DATA).classes == _CLASSES


def test_images_in_the_root_have_no_classes(tmp_path: Path, images: Images):
    _write_folder(images, str(tmp_path))
    (tmp_path / "loose.PNG").write_bytes(images[0][2])
    index = build_index(str(tmp_path), _DATA)
    assert (index.has_labels, index.classes) == (False, ())
    assert {row["label"] for row in _all(index)} == {-1}


def test_a_test_set_without_a_class_keeps_the_training_sets_numbers(tmp_path: Path, images: Images):
    _write_folder(images[8:], str(tmp_path))
    index = build_index(str(tmp_path), _DATA, classes=_CLASSES)
    assert [row["label"] for row in _all(index)] == [1] * 8 + [2] * 8
    with pytest.raises(ValueError, match="has classes that the training images have not: bee"):
        build_index(str(tmp_path), _DATA, classes=("ant", "cat"))


def test_a_pattern_counts_classes_from_its_folder(tmp_path: Path, images: Images):
    _write_folder(images, str(tmp_path))
    index = build_index(f"{tmp_path}/*/0[1].png".replace("[1]", "1"), _DATA)
    assert index.classes == _CLASSES
    assert [row["key"] for row in _all(index)] == ["ant/01.png", "bee/01.png", "cat/01.png"]


def test_tars_with_an_image_that_has_no_class_have_no_labels(tmp_path: Path, images: Images):
    (tmp_path / "0.tar").write_bytes(_tar(images))
    (tmp_path / "1.tar").write_bytes(_tar(images[:1], labels=False))
    assert not build_index(str(tmp_path), _DATA).has_labels


def test_large_tars_are_read_in_runs_of_samples(tmp_path: Path, images: Images):
    many = [(f"{key}-{again}", label, content) for again in range(30) for key, label, content in images]
    (tmp_path / "0.tar").write_bytes(_tar(many))
    index = build_index(str(tmp_path), _DATA)
    assert index.rows.tolist() == [256, 256, 208]
    read = read_pieces(Reading.of(index, [Piece(1, 100, 103)]), _DATA)
    assert read["image"].to_pylist() == [images[(256 + 100 + row) % 24][2] for row in range(3)]


def _gone(path: Path) -> None:
    path.unlink()


def _torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:600])


@pytest.mark.parametrize("harm", [_gone, _torn])
@pytest.mark.parametrize(("layout", "name"), [("tar", "001.tar"), ("parquet", "0.parquet")])
def test_a_file_that_is_gone_or_torn_since_it_was_indexed_is_named(
    layout: str, name: str, harm: Callable[[Path], None], tmp_path: Path, images: Images
):
    _WRITERS[layout](images, str(tmp_path))
    index = build_index(str(tmp_path), _DATA)
    harm(tmp_path / name)
    with pytest.raises(ValueError, match=rf"cannot read .*{name}"):
        _all(index)


def test_an_image_file_that_is_gone_is_named(tmp_path: Path, images: Images):
    _write_folder(images, str(tmp_path))
    index = build_index(str(tmp_path), _DATA)
    (tmp_path / "bee" / "03.png").unlink()
    with pytest.raises(ValueError, match=r"cannot read .*bee/03\.png"):
        _all(index)


def test_a_torn_tar_is_refused_by_name(tmp_path: Path, images: Images):
    (tmp_path / "0.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"cannot read .*0\.tar: .*; write it again"):
        build_index(str(tmp_path), _DATA)


def test_a_class_that_is_no_number_is_named(tmp_path: Path, images: Images):
    (tmp_path / "0.tar").write_bytes(_tar([("a", "dog", images[0][2])]))  # pyright: ignore
    with pytest.raises(ValueError, match=r"0\.tar: a\.cls is b'dog', not a whole number"):
        _all(build_index(str(tmp_path), _DATA))


def test_compressed_tars_are_refused_with_the_way_out(tmp_path: Path):
    (tmp_path / "0.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0\.tar\.gz is compressed: write it anew, uncompressed"):
        build_index(str(tmp_path), _DATA)


def test_the_struct_of_hugging_face_gives_its_path_as_key(tmp_path: Path, pngs: list[bytes]):
    rows = [{"bytes": content, "path": f"{number}.png"} for number, content in enumerate(pngs[:3])]
    pq.write_table(pa.table({"image": rows, "label": np.arange(3)}), tmp_path / "0.parquet")
    assert [row["key"] for row in _all(build_index(str(tmp_path), _DATA))] == ["0.png", "1.png", "2.png"]
