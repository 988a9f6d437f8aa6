"""The images and labels of a tar follow from its names; a faulty tar gives one line that names it."""

import io
import tarfile
from pathlib import Path

import pytest

from cluster.cli.main import main
from pipelines.config import DataConfig
from pipelines.index import Index, build_index
from pipelines.packing import all_readings
from pipelines.reader import read_pieces

_DATA = DataConfig(train="")


def _write(path: Path, *files: tuple[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def _index(place: Path, **settings: str) -> Index:
    return build_index(str(place), DataConfig(train="", **settings))  # pyright: ignore[reportArgumentType]


def _rows(index: Index) -> list[tuple[str, int, bytes]]:
    """Key, label and bytes of each image. Those of `_images` are not images; the reader marks them bad."""
    samples = [sample for run in index.fragments["samples"].to_pylist() for sample in run]
    content = {path: Path(path).read_bytes() for path in index.paths}
    paths = [
        path
        for path, n in zip(index.fragments["path"].to_pylist(), index.rows, strict=True)
        for _ in range(n)
    ]
    return [
        (s["key"], s["label"], content[path][s["offset"] :][: s["size"]])
        for path, s in zip(paths, samples, strict=True)
    ]


def _images(*names: str) -> list[tuple[str, bytes]]:
    """Files with their own names as content."""
    return [(name, name.encode()) for name in names]


@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_a_damaged_tar_ends_the_command_with_one_line_that_names_it(
    harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [pair for n in range(20) for pair in (*_images(f"{n:04}.jpg"), (f"{n:04}.cls", b"1"))]
    content = bytearray(_write(tmp_path / "shard.tar", *files).read_bytes())
    with tarfile.open(tmp_path / "shard.tar") as tar:
        at = tar.getmember("0005.jpg").offset
    content[at + 110] ^= 1
    (tmp_path / "shard.tar").write_bytes(content[: at + 200] if harm == "cut" else content)
    with pytest.raises(SystemExit) as stopped:
        main(["data", "inspect", str(tmp_path)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    fault = "it is truncated after 0004.cls" if harm == "cut" else "the header after 0004.cls is damaged"
    assert f"cannot read {tmp_path}/shard.tar: {fault}; write it again" in line


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keys_keep_their_folder_and_end_at_the_first_dot(
    format: int, pngs: list[bytes], tmp_path: Path
) -> None:
    long = "/".join("x" * 45 for _ in range(3))
    keys = ["a", "folder.1/b", f"{long}/c" if format == tarfile.USTAR_FORMAT else f"{long}/{'c' * 120}"]
    files = [
        pair for n, key in enumerate(keys) for pair in ((f"{key}.png", pngs[n]), (f"{key}.cls", b"%d" % n))
    ]
    index = _index(_write(tmp_path / "a.tar", *files, format=format))
    (reading,) = all_readings(index, 10)
    rows = read_pieces(reading, _DATA).to_pylist()
    assert [(row["key"], row["label"], row["image"]) for row in rows] == [
        (key, n, pngs[n]) for n, key in enumerate(keys)
    ]


def test_dots_of_names_that_never_come_back_are_the_names_own(tmp_path: Path) -> None:
    names = [f"2021.05.03-{n}.jpg" for n in range(8)]
    files = [
        pair for n, name in enumerate(names) for pair in (*_images(name), (f"{name[:-4]}.cls", b"%d" % n))
    ]
    _write(tmp_path / "a.tar", *files)
    expected = [(name[:-4], n, name.encode()) for n, name in enumerate(names)]
    assert _rows(_index(tmp_path)) == _rows(_index(tmp_path, key_dot="last")) == expected


def test_of_several_images_the_named_one_is_taken_else_the_plain_one(tmp_path: Path) -> None:
    files = [pair for k in "ab" for pair in (*_images(f"{k}.seg.png", f"{k}.jpg"), (f"{k}.cls", b"3"))]
    _write(tmp_path / "a.tar", *files)
    assert _rows(_index(tmp_path)) == [("a", 3, b"a.jpg"), ("b", 3, b"b.jpg")]
    assert _rows(_index(tmp_path, image_ending="seg.png")) == [("a", 3, b"a.seg.png"), ("b", 3, b"b.seg.png")]
    assert _rows(_index(tmp_path, image_ending=".SEG.png"))[0][2] == b"a.seg.png"


@pytest.mark.parametrize("also", [[], ["{}.cls"], ["{}.json"]])
def test_where_nothing_says_which_image_is_meant_they_are_listed_with_the_way_out(
    also: list[str], tmp_path: Path
) -> None:
    names = ["{}.left.jpg", "{}.right.jpg", *also]
    _write(tmp_path / "0.tar", *[(name.format("a"), b"1") for name in names])
    _write(tmp_path / "1.tar", *[(name.format("b"), b"1") for name in names])
    listed = (
        r"\.tar has several images under the key [ab]: ([ab])\.left\.jpg, \1\.right\.jpg; choose one, as in "
    )
    with pytest.raises(
        ValueError, match=listed + r"--data\.image-ending left\.jpg, or, .* --data\.key-dot last"
    ):
        _index(tmp_path)
    left = _index(tmp_path, image_ending="left.jpg")
    assert [row[0] for row in _rows(left)] == ["a", "b"]
    assert [row[0] for row in _rows(_index(tmp_path, key_dot="last"))] == [
        "a.left",
        "a.right",
        "b.left",
        "b.right",
    ]


def test_two_formats_of_one_image_are_listed(tmp_path: Path) -> None:
    _write(tmp_path / "0.tar", *_images("a.jpg", "a.png"))
    with pytest.raises(
        ValueError,
        match=r"under the key a: a\.jpg, a\.png; choose one, as in --data\.image-ending jpg$",
    ):
        _index(tmp_path, key_dot="last")
    assert [row[2] for row in _rows(_index(tmp_path, image_ending="png"))] == [b"a.png"]


def test_a_name_that_is_there_twice_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "0.tar", *_images("a.jpg", "b.jpg", "a.jpg"))
    with pytest.raises(ValueError, match=r"a\.jpg occurs twice in .*0\.tar; write it again"):
        _index(tmp_path)


def test_what_macos_adds_beside_each_name_is_passed_over(tmp_path: Path) -> None:
    files = []
    for n in range(8):
        for name, content in ((f"{n}.cls", b"1"), (f"{n}.jpg", b"image")):
            files += [
                (f"./._{name}", b"\0\5\26\7"),
                (f"./{name}", content),
                (f"./__MACOSX/{name}", b"\0\5\26\7"),
            ]
    _write(tmp_path / "0.tar", *files)
    assert _rows(_index(tmp_path)) == [(f"./{n}", 1, b"image") for n in range(8)]


def test_hidden_folders_are_passed_over_but_not_the_dot_that_names_the_folder_itself(tmp_path: Path) -> None:
    place = _write(tmp_path / "a.tar", *_images("./1.jpg", "./.cache/2.jpg", ".ipynb_checkpoints/3.jpg"))
    assert [key for key, _, _ in _rows(_index(place))] == ["./1"]


def test_a_link_in_place_of_an_image_is_named_with_the_way_out(tmp_path: Path) -> None:
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            member = tarfile.TarInfo("a.jpg")
            member.type, member.linkname = kind, "elsewhere.jpg"
            tar.addfile(member)
        with pytest.raises(
            ValueError, match=r"a\.jpg of .*0\.tar is a link.*--dereference --hard-dereference"
        ):
            _index(tmp_path)


@pytest.mark.parametrize(("content", "fault"), [(None, "no .cls beside it"), (b"", "an empty .cls")])
def test_a_label_that_is_not_there_is_said_by_its_key(
    content: bytes | None, fault: str, tmp_path: Path
) -> None:
    files = [pair for n in range(8) for pair in (*_images(f"{n:04}.jpg"), (f"{n:04}.cls", b"2"))]
    files[7:8] = [] if content is None else [("0003.cls", content)]
    path = _write(tmp_path / "a.tar", *files)
    index = _index(path)
    assert index.no_labels == f"0003 of {path} has {fault}"
    assert {row[1] for row in _rows(index)} == {-1}


@pytest.mark.parametrize("label", [b"dog", b"-7", b"1.5", b"9" * 30])
def test_a_class_that_is_no_label_is_named(label: bytes, tmp_path: Path) -> None:
    _write(tmp_path / "a.tar", ("x.jpg", b"image"), ("x.cls", label))
    with pytest.raises(ValueError, match=r"a\.tar: x\.cls is b'.*', not a whole number from 0"):
        _index(tmp_path)


def test_labels_may_be_of_any_size(tmp_path: Path) -> None:
    _write(tmp_path / "a.tar", ("x.jpg", b"image"), ("x.cls", b"1000000000000000\n"))
    assert _rows(_index(tmp_path)) == [("x", 10**15, b"image")]
