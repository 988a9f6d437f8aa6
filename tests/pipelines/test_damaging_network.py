"""A network to a real S3 server that fails, drops connections, is slow and flips bits."""

import logging
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from proxy import Fault, Proxy, proxied

from cluster.objectstore import S3Server
from pipelines import storage
from pipelines.config import DataConfig
from pipelines.index import build_index
from pipelines.packing import all_readings
from pipelines.quarantine import Quarantine, Quarantined, read_quarantine
from pipelines.reader import read_pieces
from pipelines.shards import write_shards
from training.checkpoint import Checkpoints, DamagedError
from training.config import TrainConfig
from training.metrics import MetricsLog, read_metrics
from training.run_folder import claim_run, keep_index, kept_index, read_config

_AGAIN = "it arrived damaged, but intact when read again"


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of the session's S3 server."""
    with proxied(s3.variables["AWS_ENDPOINT_URL"], monkeypatch) as proxy:
        yield proxy


def _images(uri: str) -> list[bytes]:
    """The images in the Parquet shards at `uri`, by an index of their own."""
    data = DataConfig(train=uri)
    (reading,) = all_readings(build_index(uri, data), 100)
    return read_pieces(reading, data, own_bytes=True)["image"].to_pylist()


_READS: dict[str, Callable[[str], Any]] = {
    "checkpoints/step-000000005.pt": lambda run: Checkpoints(run, 1).load(5)["model"]["a"].tolist(),
    "index/train.parquet": lambda run: getattr(kept_index(run, "train"), "paths", None),
    "images/00000.parquet": lambda run: _images(f"{run}/images"),
    "config.toml": read_config,
    "metrics.jsonl": read_metrics,
    "quarantine.jsonl": lambda run: read_quarantine(f"{run}/quarantine.jsonl"),
}


@pytest.fixture
def run(bucket: str, pngs: list[bytes]) -> str:
    """A run in S3 that has one of every file that is read back."""
    run = f"{bucket}/{uuid.uuid4().hex}"
    images = [(content, 0, f"image {number}") for number, content in enumerate(pngs[:8])]
    write_shards(images, f"{run}/images", rows_per_shard=8, rows_per_group=4)
    data = DataConfig(train=f"{run}/images")
    output, _, name = run.rpartition("/")
    claim_run(run, TrainConfig(data=data, output=output, name=name))
    keep_index(run, "train", build_index(data.train, data))
    Checkpoints(run, 1).write(5, {"step": 5, "model": {"a": torch.arange(5000.0)}, "config": {}})
    log = MetricsLog(run, 0)
    log.append(step=1, loss=0.5)
    log.flush()
    quarantine = Quarantine(run)
    quarantine.add([Quarantined("a", "../b", "bad")])
    quarantine.write()
    return run


def _in_a_footer(size: int) -> int:
    """A byte that ends a Parquet file's footer, or a page, where it is the end of either that is read."""
    return size - 12


def _to(name: str, fault: Fault, *, times: int) -> Callable[[str, str, int], Fault | None]:
    def chosen(method: str, path: str, number: int) -> Fault | None:
        return fault if method == "GET" and path.endswith(name) and number <= times else None

    return chosen


@pytest.mark.parametrize("fault", ["fail", "cut", "delay", "flip"])
@pytest.mark.parametrize("name", _READS)
def test_what_passes_is_read_again(
    name: str, fault: Fault, run: str, proxy: Proxy, caplog: pytest.LogCaptureFixture
):
    whole = _READS[name](run)
    proxy.fault = _to(name, fault, times=proxy.count("GET", name) + 1)
    proxy.place = _in_a_footer if name.endswith(".parquet") else proxy.place
    with caplog.at_level(logging.WARNING):
        assert _READS[name](run) == whole
    assert proxy.done == [(fault, f"/{run.removeprefix('s3://')}/{name}")]
    if fault == "flip":
        assert [message for message in caplog.messages if message.endswith(_AGAIN)] == [caplog.messages[-1]]
        assert name in caplog.messages[-1]


@pytest.mark.parametrize("name", _READS)
def test_what_stays_flipped_is_damaged(name: str, run: str, proxy: Proxy):
    proxy.fault = _to(name, "flip", times=10**6)
    proxy.place = _in_a_footer if name.endswith(".parquet") else proxy.place
    with pytest.raises(ValueError, match=f"{name}.* is damaged|cannot read .*{name}") as damaged:
        _READS[name](run)
    assert len(proxy.done) == 3
    assert "\n" not in str(damaged.value)
    if name.endswith(".pt"):
        assert isinstance(damaged.value, DamagedError)


@pytest.mark.parametrize("megabytes", [1, 12])
@pytest.mark.parametrize("fault", ["fail", "flip request"])
def test_what_is_written_lies_there_whole(fault: Fault, megabytes: int, bucket: str, proxy: Proxy):
    place = f"{bucket}/{uuid.uuid4().hex}"
    content = bytes(range(256)) * (4096 * megabytes)
    proxy.fault = lambda method, path, number: fault if method == "PUT" and number == 1 else None
    storage.write(place, content)
    assert proxy.done == [(fault, f"/{place.removeprefix('s3://')}")]
    assert storage.read(place) == content


def test_a_flip_in_every_third_read_costs_no_image(run: str, proxy: Proxy, caplog: pytest.LogCaptureFixture):
    whole = _images(f"{run}/images")
    proxy.place = _in_a_footer
    proxy.fault = lambda method, path, number: (
        "flip" if method == "GET" and path.endswith(".parquet") and number % 3 == 0 else None
    )
    for _ in range(10):
        assert _images(f"{run}/images") == whole
    assert len(proxy.done) > 5


def test_a_key_that_has_expired_is_told_in_one_line(run: str, proxy: Proxy):
    proxy.fault = lambda method, path, number: "expired"
    for read in _READS.values():
        with pytest.raises(
            (ValueError, OSError), match=r"denied; check AWS_ACC|have expired; set fr"
        ) as said:
            read(run)
        assert "\n" not in str(said.value)
    with pytest.raises(PermissionError, match=r"writing .*: the credentials have expired; set fresh AWS_ACC"):
        storage.write(f"{run}/new", b"content")
