"""Files are written whole or not at all, and found under paths and file:// alike."""

import threading
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import fs

from pipelines import storage


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_what_is_written_is_read_back_and_listed_and_removed(tmp_path: Path, scheme: str):
    uri = storage.join(f"{scheme}{tmp_path}", "new", "folder")
    assert storage.names(uri) == []
    for name, content in (("b", b"2"), ("a", b"1"), ("a", b"longer than before"), ("c", b"")):
        storage.write(storage.join(uri, name), content)
    assert storage.names(uri) == ["a", "b", "c"]
    assert [storage.read(storage.join(uri, name)) for name in "abc"] == [b"longer than before", b"2", b""]
    storage.remove(storage.join(uri, "b"))
    assert storage.names(uri) == ["a", "c"]


def test_a_write_leaves_nothing_but_the_file(tmp_path: Path):
    storage.write(f"{tmp_path}/file", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_no_partial_file(tmp_path: Path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        storage.write(f"{tmp_path}/taken", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path):
    storage.write(f"{tmp_path}/file", b"old")
    with pytest.raises(TypeError):
        storage.write(f"{tmp_path}/file", "not bytes")  # pyright: ignore[reportArgumentType]
    assert storage.read(f"{tmp_path}/file") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path):
    uri, done = f"{tmp_path}/file", threading.Event()
    contents = [bytes([byte]) * 200_000 for byte in range(30)]
    storage.write(uri, contents[0])

    def rewrite() -> None:
        for content in contents:
            storage.write(uri, content)
        done.set()

    writer = threading.Thread(target=rewrite)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(storage.read(uri))
    writer.join()
    assert seen <= set(contents)


def test_what_is_not_there_is_none(tmp_path: Path):
    assert storage.read(f"{tmp_path}/nothing") is None
    assert storage.read(str(tmp_path)) is None


def test_names_are_those_of_files_directly_below(tmp_path: Path):
    storage.write(f"{tmp_path}/below/deep", b"")
    storage.write(f"{tmp_path}/file", b"")
    assert storage.names(str(tmp_path)) == ["file"]


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.write("~/file", b"at home")
    assert (tmp_path / "file").read_bytes() == b"at home"


def test_joining_never_doubles_a_slash():
    assert storage.join("s3://bucket/", "a", "b") == "s3://bucket/a/b"
    assert storage.join("folder", "a") == "folder/a"


def test_a_path_is_on_this_machine(tmp_path: Path):
    filesystem, path = storage.resolve(str(tmp_path))
    assert isinstance(filesystem, fs.LocalFileSystem)
    assert path == str(tmp_path)


@pytest.mark.parametrize("uri", ["ftp://host/file", "nonsense://host/file"])
def test_an_unknown_scheme_is_refused_with_those_that_work(uri: str):
    with pytest.raises(
        ValueError, match=rf"cannot open {uri}: .*; use a path, file://, s3://, gs://, az:// or abfs://"
    ):
        storage.resolve(uri)


def test_an_error_is_told_in_one_line():
    assert storage.first_line(pa.ArrowInvalid("first\nsecond\n")) == "first"
    assert storage.first_line(ValueError()) == "ValueError"
