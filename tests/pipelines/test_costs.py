"""Reading from a real S3 server takes no more requests and bytes than its files and images need."""

import io
import tarfile
import uuid
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from proxy import Proxy, proxied

from cluster.objectstore import S3Server
from pipelines import storage
from pipelines.config import DataConfig
from pipelines.index import build_index
from pipelines.labels import read_labels
from pipelines.packing import all_readings
from pipelines.plan import Piece
from pipelines.reader import Reading, read_pieces

_DATA = DataConfig(train="")
_GROUPS, _ROWS = 40, 5


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with proxied(s3.variables["AWS_ENDPOINT_URL"], monkeypatch) as proxy:
        yield proxy


@pytest.fixture
def parquet(bucket: str, pngs: list[bytes]) -> str:
    """Three files of many small row groups, whose labels are the images' places in their file."""
    uri = f"{bucket}/{uuid.uuid4().hex}"
    rows = _GROUPS * _ROWS
    table = pa.table({"image": [pngs[n % len(pngs)] for n in range(rows)], "label": np.arange(rows)})
    for number in range(3):
        out = io.BytesIO()
        pq.write_table(table, out, row_group_size=_ROWS, compression="none", write_statistics=False)
        assert len(out.getvalue()) > 4 * _END
        storage.write(f"{uri}/{number}.parquet", out.getvalue())
    return uri


# What is read of a Parquet file's end for its footer.
_END = 64 << 10


def _requests(proxy: Proxy, method: str) -> list[dict[str, str]]:
    """The answers' headers of all requests of that kind for files."""
    return [answer for kind, path, _, answer in proxy.seen if kind == method and "list-type" not in path]


def _bytes(proxy: Proxy) -> int:
    return sum(int(answer["Content-Length"]) for answer in _requests(proxy, "GET"))


def _footers(proxy: Proxy) -> int:
    """Requests for a range that reaches the end of its file."""
    ranges = [answer["Content-Range"].partition("/") for answer in _requests(proxy, "GET")]
    return sum(int(span.rpartition("-")[2]) == int(size) - 1 for span, _, size in ranges)


def test_labels_take_one_open_and_one_footer_a_file(parquet: str, proxy: Proxy):
    index = build_index(parquet, _DATA)
    proxy.seen.clear()
    labels = read_labels(index, _DATA, lambda done, fragments: None)
    assert labels.tolist() == 3 * list(range(_GROUPS * _ROWS))
    assert len(_requests(proxy, "HEAD")) == _footers(proxy) == 3
    # Beside the footers some hundred bytes a row group.
    assert _bytes(proxy) < 3 * (_END + 500 * _GROUPS)


def test_a_window_of_many_row_groups_opens_each_file_once_and_its_footer_stays(parquet: str, proxy: Proxy):
    index = build_index(parquet, _DATA)
    order = np.random.default_rng(0).permutation(len(index.rows)).tolist()
    for turn, window in enumerate((order[::2], order[1::2])):
        proxy.seen.clear()
        table = read_pieces(Reading.of(index, [Piece(fragment, 1, 4) for fragment in window]), _DATA)
        samples = [fragment * _ROWS + row for fragment in window for row in (1, 2, 3)]
        assert table["sample"].to_pylist() == samples
        assert table["label"].to_pylist() == [sample % (_GROUPS * _ROWS) for sample in samples]
        assert len(_requests(proxy, "HEAD")) == 3
        assert _footers(proxy) == (0 if turn else 3)


def test_row_groups_that_lie_side_by_side_are_one_request(parquet: str, proxy: Proxy):
    index = build_index(parquet, _DATA)
    (reading,) = all_readings(index, len(index.samples))
    for turn in range(2):
        proxy.seen.clear()
        read_pieces(reading, _DATA)
        assert len(_requests(proxy, "GET")) == (3 if turn else 6)


def _tar(images: int, size: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number in range(images):
            for name, content in ((f"{number}.jpg", bytes(size)), (f"{number}.cls", b"%d" % number)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def test_a_tar_of_photographs_is_listed_in_ranges_and_not_image_by_image(bucket: str, proxy: Proxy):
    uri = f"{bucket}/{uuid.uuid4().hex}.tar"
    content = _tar(100, 110_000)
    storage.write(uri, content)
    proxy.seen.clear()
    index = build_index(uri, _DATA)
    assert read_labels(index, _DATA, lambda done, fragments: None).tolist() == list(range(100))
    assert len(_requests(proxy, "GET")) == -(-len(content) // (2 << 20))
    assert _bytes(proxy) == len(content)


def test_of_a_tar_of_large_members_little_more_than_its_headers_is_read(bucket: str, proxy: Proxy):
    uri = f"{bucket}/{uuid.uuid4().hex}.tar"
    for number in range(16):
        storage.write(uri.replace(".tar", f"/{number}.tar"), _tar(1, 100))
    storage.write(uri.replace(".tar", "/large.tar"), _tar(8, 9 << 20))
    proxy.seen.clear()
    index = build_index(uri.removesuffix(".tar"), _DATA)
    assert int(index.rows.sum()) == 24
    # Two ranges from the front, and after that a buffer for each image.
    assert _bytes(proxy) < (4 << 20) + (40 << 16)
