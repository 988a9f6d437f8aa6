"""Files that grow: what a flush writes, here and in object storage, and what a failed one leaves."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from proxy import Proxy, proxied
from small_disks import Full, small_disk

from cluster.objectstore import S3Server
from pipelines import storage
from pipelines.storage.growing import GrowingFile, Place, segment_uri, segments

_LINE = b"a line of some bytes\n"


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of the session's S3 server."""
    with proxied(s3.variables["AWS_ENDPOINT_URL"], monkeypatch) as proxy:
        yield proxy


@pytest.fixture
def uri(bucket: str) -> str:
    """That of a file in S3 which does not exist."""
    return f"{bucket}/{uuid.uuid4().hex}/file"


def _written() -> int:
    """Bytes that this process has handed to the kernel to be written, by the kernel's own count."""
    return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])


def _put(proxy: Proxy) -> list[str]:
    """The names of the objects that were written, one for each time."""
    paths = [path.partition("?")[0] for method, path, *_ in proxy.seen if method == "PUT"]
    # pyarrow writes a folder's mark when it deletes a file.
    return [path.rpartition("/")[2] for path in paths if not path.endswith("/")]


def _stored(uri: str) -> list[bytes]:
    """The content of each segment."""
    return [storage.read(segment_uri(uri, number)) or b"" for number in segments(uri)]


def _grow(file: GrowingFile, flushes: int, lines: int = 1) -> None:
    for _ in range(flushes):
        for _ in range(lines):
            file.write(_LINE)
        file.flush()


def test_on_this_machine_a_flush_writes_what_is_new_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    file = GrowingFile(str(path))
    _grow(file, 1, lines=100_000)
    before, inode = _written(), path.stat().st_ino
    _grow(file, 10)
    assert _written() - before == 10 * len(_LINE)
    assert path.stat().st_ino == inode
    assert path.read_bytes() == 100_010 * _LINE
    before = _written()
    file.flush()
    assert _written() == before


def test_in_s3_a_segment_is_written_whole_until_it_is_complete_and_then_never_again(
    uri: str, proxy: Proxy
) -> None:
    file = GrowingFile(uri, segment_bytes=3 * len(_LINE))
    _grow(file, 8)
    assert _stored(uri) == [3 * _LINE, 3 * _LINE, 2 * _LINE]
    assert _put(proxy) == 3 * ["file"] + 3 * ["file.00002"] + 2 * ["file.00003"]


@pytest.mark.parametrize(
    ("keep", "left", "written"),
    [
        (Place(1, 0), [1], "file"),
        (Place(2, len(_LINE)), [3, 2], "file.00002"),
        (Place(2, 3 * len(_LINE)), [3, 3, 1], "file.00003"),
        (Place(3, 2 * len(_LINE)), [3, 3, 3], "file.00003"),
    ],
)
def test_what_lies_behind_the_place_to_keep_is_dropped_and_nothing_before_it_written(
    keep: Place, left: list[int], written: str, uri: str, proxy: Proxy
) -> None:
    _grow(GrowingFile(uri, segment_bytes=3 * len(_LINE)), 8)
    whole = _stored(uri)
    proxy.seen.clear()
    file = GrowingFile(uri, keep, segment_bytes=3 * len(_LINE))
    assert _stored(uri) == whole
    _grow(file, 1)
    assert _stored(uri) == [lines * _LINE for lines in left]
    assert _put(proxy) == [written]


def test_a_copied_file_of_several_segments_grows_at_the_end_of_the_one_that_is_kept(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        Path(segment_uri(str(tmp_path / "file"), number)).write_bytes(3 * _LINE)
    (tmp_path / "file.00002.mine").touch()
    _grow(GrowingFile(str(tmp_path / "file"), Place(2, len(_LINE))), 2)
    assert _stored(str(tmp_path / "file")) == [3 * _LINE, 3 * _LINE]
    assert (tmp_path / "file.00002.mine").exists()


def test_a_flush_on_a_full_disk_is_made_good_by_the_next_one(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        file = GrowingFile(str(disk / "file"))
        _grow(file, 1)
        full = Full(disk)
        full.begin()
        (disk / "ballast").write_bytes((disk / "ballast").read_bytes()[: -4 * 4096])
        # It takes the first few pages of this.
        file.write(10_000 * _LINE)
        for _ in range(2):
            with pytest.raises(OSError, match=r"No space left on device: '.*/disk/file'"):
                file.flush()
            assert len(_LINE) < (disk / "file").stat().st_size < 10_000 * len(_LINE)
        full.end()
        _grow(file, 1)
        assert (disk / "file").read_bytes() == 10_002 * _LINE


def test_a_flush_that_s3_does_not_take_is_made_good_by_the_next_one(
    uri: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIPTYCH_STORAGE_TIMEOUT", "0")
    file = GrowingFile(uri, segment_bytes=3 * len(_LINE))
    _grow(file, 1)
    proxy.fault = lambda method, path, number: "expired" if method == "PUT" else None
    file.write(3 * _LINE)
    for _ in range(2):
        with pytest.raises(PermissionError, match="the credentials have expired"):
            file.flush()
        assert _stored(uri) == [_LINE]
    proxy.fault = lambda method, path, number: None
    _grow(file, 2)
    assert _stored(uri) == [5 * _LINE, _LINE]


def test_what_a_process_that_was_killed_in_a_flush_has_left_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write = (
        "import resource, signal, sys; from pipelines.storage.growing import GrowingFile\n"
        "file = GrowingFile(sys.argv[1]); file.write(bytes(400)); file.flush()\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        "file.write(bytes(400)); file.flush(); file.write(bytes(400)); file.flush()"
    )
    done = subprocess.run([sys.executable, "-c", write, path], env=dict(os.environ), check=False)
    assert done.returncode == -signal.SIGXFSZ
    assert path.stat().st_size == 1000
    _grow(GrowingFile(str(path), Place(1, 800)), 1)
    assert path.read_bytes() == bytes(800) + _LINE


def test_what_another_process_has_appended_in_between_stays_whole(tmp_path: Path) -> None:
    ours, theirs = GrowingFile(str(tmp_path / "file")), GrowingFile(str(tmp_path / "file"), Place(1, 21))
    _grow(ours, 1)
    _grow(theirs, 1)
    _grow(ours, 1)
    _grow(theirs, 1)
    assert (tmp_path / "file").read_bytes() == 4 * _LINE
