"""A folder in S3 is listed in parallel if its subfolders are large, and completely in any case."""

import uuid
from collections.abc import Iterator

import pytest
from proxy import Proxy, proxied
from pyarrow import fs

from cluster.objectstore import S3Server
from pipelines import storage
from pipelines.storage import walk

_FOLDERS, _EACH = 10, 4


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with proxied(s3.variables["AWS_ENDPOINT_URL"], monkeypatch) as proxy:
        yield proxy


@pytest.fixture
def place(bucket: str) -> str:
    """Folders of files and of further folders, and files beside them."""
    uri = f"{bucket}/{uuid.uuid4().hex}"
    for folder in range(_FOLDERS):
        for number in range(_EACH):
            storage.write(f"{uri}/class {folder}/{'deep/' * (number % 2)}{number}.jpg", b"image")
    for number in range(3):
        storage.write(f"{uri}/beside-{number}", b"")
    return uri


def _requests(proxy: Proxy) -> int:
    """Requests for a page of a listing of more than one name."""
    listings = [path for method, path, _, _ in proxy.seen if method == "GET" and "list-type" in path]
    return sum("max-keys=1&" not in f"{path}&" for path in listings)


def _by_pyarrow(uri: str) -> list[str]:
    """The same files in one recursive listing."""
    filesystem, path = storage.resolve(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    return sorted(info.path for info in infos if info.type == fs.FileType.File)


def test_large_subfolders_are_listed_each_by_itself_and_progress_is_told(
    place: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(walk, "_OBJECTS", _EACH)
    told: list[int] = []
    paths = [info.path for info in storage.listing(place, told.append)]
    assert _requests(proxy) == 1 + _FOLDERS
    assert paths == _by_pyarrow(place)
    assert len(paths) == 3 + _FOLDERS * _EACH
    assert len(told) == _FOLDERS
    assert told == sorted(told)


def test_of_many_small_subfolders_only_the_first_few_are_listed_by_themselves(place: str, proxy: Proxy):
    paths = [info.path for info in storage.listing(place)]
    assert _requests(proxy) == 1 + 8 + 1
    assert paths == _by_pyarrow(place)


def test_few_subfolders_are_listed_each_by_itself(place: str, proxy: Proxy):
    assert len(storage.listing(f"{place}/class 1")) == _EACH
    assert _requests(proxy) == 1 + 1
