"""The requests and bytes of an epoch are those that a real S3 server gets."""

import io
import tarfile
import uuid
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from proxy import Proxy, proxied

from cluster.objectstore import S3Server
from pipelines import storage
from pipelines.config import DataConfig
from pipelines.epoch_cost import epoch_cost
from pipelines.index import Index, build_index
from pipelines.plan import Plan
from pipelines.reader import read_windows

_IMAGES = 320


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with proxied(s3.variables["AWS_ENDPOINT_URL"], monkeypatch) as proxy:
        yield proxy


def _images() -> list[bytes]:
    random = np.random.default_rng(0)
    return [random.bytes(size) for size in random.integers(1000, 3000, _IMAGES).tolist()]


def _folder(uri: str) -> None:
    for number, image in enumerate(_images()):
        storage.write(f"{uri}/{number % 3}/{number:03}.jpg", image)


def _tars(uri: str) -> None:
    for number in range(2):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for at, image in enumerate(_images()):
                member = tarfile.TarInfo(f"{at}.jpg")
                member.size = len(image)
                tar.addfile(member, io.BytesIO(image))
        storage.write(f"{uri}/{number}.tar", out.getvalue())


def _parquet(uri: str) -> None:
    for number in range(3):
        out = io.BytesIO()
        table = pa.table({"image": _images(), "label": np.arange(_IMAGES)})
        pq.write_table(table, out, row_group_size=20, compression="none", write_statistics=False)
        storage.write(f"{uri}/{number}.parquet", out.getvalue())


@pytest.mark.parametrize("write", [_folder, _tars, _parquet])
def test_they_are_those_of_reading_all_windows(bucket: str, proxy: Proxy, write: Callable[[str], None]):
    uri = f"{bucket}/{uuid.uuid4().hex}"
    write(uri)
    data = DataConfig(train=uri)
    index = build_index(uri, data)
    plan = Plan(index.rows, seed=0, lanes=2, batch_size=16, window_rows=64, random_access=index.random_access)
    cost = epoch_cost(index, plan, price=0.5)
    assert cost is not None
    proxy.seen.clear()
    windows = list(plan.windows(range(2), 0, plan.steps_per_epoch))
    for _ in read_windows(index, data, windows):
        pass
    answers = [answer for kind, path, _, answer in proxy.seen if kind == "GET" and "list-type" not in path]
    heads = [kind for kind, _, _, _ in proxy.seen if kind == "HEAD"]
    assert cost.images == sum(window.rows for window in windows)
    assert cost.requests == len(answers) + len(heads)
    assert cost.price == cost.requests / 1000 * 0.5
    # Those of a Parquet file's row groups are not known by themselves.
    read = sum(int(answer["Content-Length"]) for answer in answers)
    assert cost.bytes == pytest.approx(read, rel=0.05 if write is _parquet else 0)


def test_more_readers_read_the_footers_again(index: Index):
    plan = Plan(index.rows, seed=0, lanes=1, batch_size=8, window_rows=16)
    one, four = (epoch_cost(index, plan, price=1, readers=readers) for readers in (1, 4))
    assert one is not None
    assert four is not None
    assert four.requests - one.requests == 3 * len(index.paths)
