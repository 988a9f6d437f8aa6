"""Files are written atomically, and behave alike on this machine and in every object storage."""

import errno
import logging
import os
import resource
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from objectstores import azure_server, azurite, gcs_server
from small_disks import Full, Harm, NoInodes, ReadOnly, small_disk

from cluster.objectstore import s3_server
from pipelines import storage
from pipelines.storage import retry

AZURE = pytest.param("azure_container", marks=pytest.mark.azure)
REMOTE = ["bucket", "gcs_bucket", AZURE]


@pytest.fixture(params=["", "file://", *REMOTE])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of a folder that does not exist yet, on this machine and in each object storage."""
    return _new_folder(request, tmp_path)


@pytest.fixture(params=REMOTE)
def remote_place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of a folder that does not exist yet in each object storage."""
    return _new_folder(request, tmp_path)


def _new_folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param in ("", "file://"):
        return f"{request.param}{tmp_path}/new"
    return f"{request.getfixturevalue(request.param)}/{uuid.uuid4().hex}"


def test_what_is_written_is_read_back_and_listed_and_removed(place: str):
    uri = storage.join(place, "folder")
    assert storage.names(uri) == []
    for name, content in (("b", b"2"), ("a", b"1"), ("a", b"longer than before"), ("c", b"")):
        storage.write(storage.join(uri, name), content)
    assert storage.names(uri) == ["a", "b", "c"]
    assert [storage.read(storage.join(uri, name)) for name in "abc"] == [b"longer than before", b"2", b""]
    storage.remove(storage.join(uri, "b"))
    assert storage.names(uri) == ["a", "c"]


def test_what_is_not_there_is_none(place: str):
    assert storage.read(f"{place}/nothing") is None
    assert not storage.exists(f"{place}/nothing")
    storage.remove(f"{place}/nothing")
    with pytest.raises(FileNotFoundError, match=f"{place}/nothing does not exist"):
        storage.listing(f"{place}/nothing")


def test_a_folder_exists_but_is_no_file(place: str):
    storage.write(f"{place}/below/file", b"content")
    assert storage.exists(f"{place}/below")
    assert storage.read(f"{place}/below") is None


def test_names_are_those_of_files_directly_below_and_a_listing_goes_deeper(place: str):
    for name, content in (("below/deep/file", b"123"), ("file", b"1"), ("below/file", b"")):
        storage.write(f"{place}/{name}", content)
    assert storage.names(place) == ["file"]
    _, root = storage.resolve(place)
    found = [(info.path.removeprefix(root), info.size) for info in storage.listing(place)]
    assert found == [("/below/deep/file", 3), ("/below/file", 0), ("/file", 1)]


def test_a_file_lists_itself(place: str):
    storage.write(f"{place}/file", b"123")
    (info,) = storage.listing(f"{place}/file")
    assert (info.path, info.size) == (storage.resolve(f"{place}/file")[1], 3)


def test_what_is_listed_is_opened_by_its_path(place: str):
    storage.write(f"{place}/file", b"0123456789")
    filesystem, _ = storage.resolve(place)
    (info,) = storage.listing(place)
    with filesystem.open_input_file(info.path) as file:
        file.seek(4)
        assert file.read(3) == b"456"


def test_names_and_content_are_taken_as_they_are(remote_place: str):
    for name in ("with space", "percent%20", "hash#tag", "ümlaut", "not packed.gz"):
        storage.write(f"{remote_place}/{name}", name.encode())
        assert storage.read(f"{remote_place}/{name}") == name.encode()
    assert storage.names(remote_place) == sorted(
        ["with space", "percent%20", "hash#tag", "ümlaut", "not packed.gz"]
    )


def test_a_large_file_is_whole(remote_place: str):
    content = bytes(range(256)) * 100_000  # Several parts of an upload.
    storage.write(f"{remote_place}/file", content)
    assert storage.read(f"{remote_place}/file") == content


def test_a_listing_is_complete_beyond_a_page(gcs_bucket: str):
    place = f"{gcs_bucket}/{uuid.uuid4().hex}"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: storage.write(f"{place}/{number:04}", b""), range(1100)))
    assert [info.base_name for info in storage.listing(place)] == [f"{number:04}" for number in range(1100)]


def test_a_write_leaves_nothing_but_the_file(place: str):
    storage.write(f"{place}/file", b"content")
    assert [info.base_name for info in storage.listing(place)] == ["file"]


def test_a_write_of_what_is_no_bytes_keeps_the_old_file(place: str):
    storage.write(f"{place}/file", b"old")
    with pytest.raises(TypeError):
        storage.write(f"{place}/file", "not bytes")  # pyright: ignore[reportArgumentType]
    assert storage.read(f"{place}/file") == b"old"
    assert [info.base_name for info in storage.listing(place)] == ["file"]


def test_a_write_over_a_folder_leaves_it_as_it_is(tmp_path: Path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError, match=f"'{tmp_path}/taken'"):
        storage.write(f"{tmp_path}/taken", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_full_disk_keeps_the_old_file_and_is_told_with_the_path(tmp_path: Path):
    storage.write(f"{tmp_path}/file", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"'{tmp_path}/file'"):
            storage.write(f"{tmp_path}/file", bytes(2_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert storage.read(f"{tmp_path}/file") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_that_cannot_be_written_is_told_with_the_path(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="'/proc/sys/file'"):
        storage.write("/proc/sys/file", b"content")  # Read-only for root, too.
    with pytest.raises(FileExistsError, match=f"'{tmp_path}/file'"):
        storage.write(f"{tmp_path}/file/below", b"content")


_REFUSALS: dict[type[Harm], tuple[int, str]] = {
    Full: (errno.ENOSPC, "free space there"),
    NoInodes: (errno.ENOSPC, "delete small files there"),
    ReadOnly: (errno.EROFS, "mount it so that it can be written"),
}


@pytest.mark.parametrize("kind", _REFUSALS)
def test_a_disk_that_takes_no_writes_keeps_the_old_file_and_there_is_a_way_out(
    kind: type[Harm], tmp_path: Path
):
    with small_disk(tmp_path / "disk", "size=1m,nr_inodes=50") as disk:
        storage.write(f"{disk}/run/file", b"old")
        harm = kind(disk)
        harm.begin()
        with pytest.raises(OSError, match=f"'{disk}/run/file'") as refused:
            storage.write(f"{disk}/run/file", bytes(5000))
        assert (refused.value.errno, storage.way_out(refused.value)) == _REFUSALS[kind]
        assert storage.read(f"{disk}/run/file") == b"old"
        harm.end()
        storage.write(f"{disk}/run/file", b"new")
        assert [path.name for path in (disk / "run").iterdir()] == ["file"]


def test_a_folder_that_has_vanished_is_told_and_not_made_anew(tmp_path: Path, bucket: str):
    run = tmp_path / "runs" / "one"
    storage.make_folder(str(run))
    storage.check_folder(str(run))
    run.rmdir()
    with pytest.raises(FileNotFoundError, match=f"the folder has vanished: '{run}'") as vanished:
        storage.check_folder(str(run))
    assert storage.way_out(vanished.value) == "bring it back, or mount its disk again"
    storage.make_folder(f"{bucket}/none")  # Object storage has no folders that could vanish.
    storage.check_folder(f"{bucket}/none")
    assert not storage.exists(f"{bucket}/none")


def test_a_reader_sees_the_old_file_or_the_new_one(place: str):
    uri, done = f"{place}/file", threading.Event()
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


@pytest.mark.parametrize("server", REMOTE)
def test_a_bucket_that_does_not_exist_is_told_at_once(server: str, request: pytest.FixtureRequest):
    uri = f"{request.getfixturevalue(server)}-missing/key"
    with pytest.raises(FileNotFoundError, match=f"the bucket of {uri} does not exist"):
        storage.listing(uri)
    with pytest.raises(FileNotFoundError, match=f"writing {uri}: the bucket does not exist"):
        storage.write(uri, b"content")


@pytest.mark.parametrize(
    ("server", "variable", "message"),
    [
        ("bucket", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("bucket", "AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        pytest.param(
            "azure_container",
            "AZURE_STORAGE_CONNECTION_STRING",
            "AZURE_STORAGE_ACCOUNT and AZURE_STORAGE_KEY",
            marks=pytest.mark.azure,
        ),
    ],
)
def test_wrong_credentials_are_told_at_once_and_not_repeated(
    server: str, variable: str, message: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    uri = request.getfixturevalue(server)
    wrong = {"AZURE_STORAGE_CONNECTION_STRING": _with_another_key}.get(variable, lambda _: "hunter2")
    monkeypatch.setenv(variable, wrong(os.environ[variable]))
    monkeypatch.setattr(retry, "_answered", set())  # As in a process that begins with them.
    for call in (
        lambda: storage.read(f"{uri}/key"),
        lambda: storage.write(f"{uri}/key", b"content"),
        lambda: storage.listing(uri),
        lambda: storage.names(uri),
        lambda: storage.exists(f"{uri}/key"),
        lambda: storage.remove(f"{uri}/key"),
    ):
        with pytest.raises(PermissionError, match=f"{uri}.*: access was denied; check {message}") as error:
            call()
        assert "hunter2" not in str(error.value)
        assert "\n" not in str(error.value)


def _with_another_key(connection: str) -> str:
    return connection.replace("AccountKey=", "AccountKey=hunter2+")


@contextmanager
def _s3(folder: Path) -> Iterator[tuple[str, Callable[[], None], Callable[[], None]]]:
    with s3_server(folder, bucket="outage") as server:
        yield "s3://outage", server.stop, server.start


@contextmanager
def _gcs(folder: Path) -> Iterator[tuple[str, Callable[[], None], Callable[[], None]]]:
    with gcs_server(folder, bucket="outage") as server:
        yield "gs://outage", server.stop, server.start


@contextmanager
def _azure(folder: Path) -> Iterator[tuple[str, Callable[[], None], Callable[[], None]]]:
    if azurite() is None:
        pytest.skip("no `azurite-blob` on PATH; npm install -g azurite")
    with azure_server(folder, container="outage") as server:
        yield "az://outage", server.stop, server.start


@pytest.mark.parametrize("serve", [_s3, _gcs, pytest.param(_azure, marks=pytest.mark.azure)])
def test_reads_and_writes_outlast_an_outage(
    serve: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with serve(tmp_path) as (uri, stop, start), ThreadPoolExecutor(2) as pool:
        storage.write(f"{uri}/old", b"kept")
        stop()
        with caplog.at_level(logging.WARNING):
            reading = pool.submit(storage.read, f"{uri}/old")
            writing = pool.submit(storage.write, f"{uri}/new", b"not lost")
            threading.Event().wait(3)
            assert not reading.done()
            assert not writing.done()
            start()
            assert reading.result() == b"kept"
            writing.result()
        assert storage.read(f"{uri}/new") == b"not lost"
        assert [info.base_name for info in storage.listing(uri)] == ["new", "old"]
    if serve is _azure:
        return  # Azure's own client bridges so short an outage in silence.
    for what in (f"reading {uri}/old", f"writing {uri}/new"):
        said = [message for message in caplog.messages if message.startswith(what)]
        assert [message.removeprefix(what)[:11] for message in said] == [": waiting f", ": the stora"]


def test_what_killed_writers_have_left_is_removed_and_younger_ones_stay_where_they_may_be_in_use(place: str):
    # Where pyarrow itself writes beside the file: see _write_azure.
    below = "/content" if place.startswith("az://") else ""
    left = [f"{place}/{name}.{uuid.uuid4().hex}.partial{below}" for name in (".a", ".b", "deep/.a")]
    for uri in (*left, f"{place}/a", f"{place}/.a.partial"):
        storage.write(uri, b"1")
    storage.remove_partials(place, older_than=60)
    assert all(storage.exists(uri) for uri in left)
    storage.remove_partials(place, of="b")
    remote = place.startswith(("s3://", "gs://"))  # Nothing is left there, and nothing looked for.
    assert [storage.exists(uri) for uri in left] == [True, remote, True]
    storage.remove_partials(place)
    assert [storage.exists(uri) for uri in left] == [remote] * 3
    assert storage.exists(f"{place}/a")
    assert storage.exists(f"{place}/.a.partial")
    storage.remove_partials(f"{place}/nothing")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.write("~/file", b"at home")
    assert (tmp_path / "file").read_bytes() == b"at home"


def test_joining_never_doubles_a_slash():
    assert storage.join("s3://bucket/", "a", "b") == "s3://bucket/a/b"
    assert storage.join("folder", "a") == "folder/a"
