"""A shuffle's order is one permutation of all rows, for any division into jobs; nobody reads its parts."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from flips import flips
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines import storage
from pipelines.config import DataConfig
from pipelines.index import Index, build_index
from pipelines.labels import read_labels
from pipelines.mixing import Mixing, measure
from pipelines.packing import (
    Order,
    direct_jobs,
    finished_parts,
    finished_shards,
    pack_shard,
    part_jobs,
    remove_parts,
    write_gathered,
    write_part,
)
from pipelines.philox import derive_key, permutation
from pipelines.plan import Plan
from pipelines.shards import write_shards

_CLASSES, _PER_CLASS = 8, 40


def _shuffled(
    index: Index,
    data: DataConfig,
    dest: str,
    *,
    seed: int,
    shard: int,
    part: int,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Write what is missing of the shuffle at `dest`, job by job until `stop()`; whether it is complete."""
    order = Order.of(seed, int(index.rows.sum()), shard)
    jobs = list(part_jobs(index, part))
    for job in jobs:
        if job.number not in finished_parts(dest):
            if stop():
                return False
            write_part(job, data, dest, order)
    for number in set(range(order.shards)) - set(finished_shards(dest)):
        if stop():
            return False
        write_gathered(
            number, dest, order, parts=len(jobs), labelled=index.has_labels, rows_per_group=5, classes=()
        )
    return True


def _keys(dest: str) -> list[str]:
    """The keys of the shards' rows, in the order of the shards' names."""
    names = [name for name in storage.names(dest) if name.endswith(".parquet")]
    tables = [pq.read_table(io.BytesIO(storage.read(storage.join(dest, name)) or b"")) for name in names]
    return [key for table in tables for key in table["key"].to_pylist()]


def _expected(seed: int, images: int) -> list[str]:
    return [f"image {row}" for row in permutation(derive_key(seed, 5), images)]


@settings(
    derandomize=True,
    deadline=None,
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(0, 2**40), st.integers(1, 40), st.integers(1, 40))
def test_the_order_is_one_permutation_of_all_rows_whatever_the_sizes(
    index: Index,
    data: DataConfig,
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    shard: int,
    part: int,
):
    dest, images = tmp_path_factory.mktemp("shuffled"), int(index.rows.sum())
    assert _shuffled(index, data, str(dest), seed=seed, shard=shard, part=part)
    assert _keys(str(dest)) == _expected(seed, images)
    rows = [len(pq.read_table(path)) for path in sorted(dest.glob("*.parquet"))]
    assert rows == [min(shard, images - start) for start in range(0, images, shard)]


def test_bytes_and_labels_come_with_their_keys(
    index: Index, data: DataConfig, encoded: list[bytes], tmp_path: Path
):
    _shuffled(index, data, str(tmp_path), seed=1, shard=9, part=10)
    for row in pq.read_table(tmp_path).to_pylist():
        number = int(row["key"].removeprefix("image "))
        assert (row["image"], row["label"]) == (encoded[number], number % 10)


def test_images_that_are_read_one_by_one_get_the_same_order(index: Index, data: DataConfig, tmp_path: Path):
    for job in direct_jobs(index, 3, 10):
        pack_shard(job, data, str(tmp_path), rows_per_group=5, classes=())
    assert _keys(str(tmp_path)) == _expected(3, int(index.rows.sum()))


@pytest.mark.parametrize("jobs", range(8))
def test_stopped_after_any_job_it_resumes_to_the_same_shards(
    index: Index, data: DataConfig, tmp_path: Path, jobs: int
):
    left = iter(range(jobs))
    sizes = {"seed": 7, "shard": 10, "part": 8}
    complete = _shuffled(index, data, str(tmp_path), **sizes, stop=lambda: next(left, None) is None)
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(written) == jobs
    assert not complete
    assert _shuffled(index, data, str(tmp_path), **sizes)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in written} == written
    assert _keys(str(tmp_path)) == _expected(7, int(index.rows.sum()))


def test_on_s3_parts_are_not_read_as_images_and_are_removed(index: Index, data: DataConfig, bucket: str):
    dest = f"{bucket}/shuffled"
    _shuffled(index, data, dest, seed=2, shard=10, part=8)
    images = int(index.rows.sum())
    assert len(finished_parts(dest)) == 4
    filesystem, path = storage.resolve(dest)
    assert int(build_index(dest, data).rows.sum()) == images
    assert len(pq.read_table(path, filesystem=filesystem)) == images
    remove_parts(dest)
    assert storage.names(dest) == [f"0000{n}.parquet" for n in range(4)]
    assert _keys(dest) == _expected(2, images)


def test_what_a_kill_leaves_of_a_part_on_a_disk_is_removed_too(tmp_path: Path):
    for name in ("_part-00000", "._part-00001.0f.partial", "00000.parquet"):
        (tmp_path / name).write_bytes(b"x")
    remove_parts(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["00000.parquet"]


def test_a_flipped_bit_in_a_part_is_an_error_that_names_it(index: Index, data: DataConfig, tmp_path: Path):
    order = Order.of(0, int(index.rows.sum()), 40)
    (job,) = part_jobs(index, 100)
    write_part(job, data, str(tmp_path), order)
    part = tmp_path / "_part-00000"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(ValueError, match=f"{part} is damaged; delete it"):
        write_gathered(0, str(tmp_path), order, parts=1, labelled=True, rows_per_group=5, classes=())


def test_every_bit_of_a_parts_ending_is_checked_before_it_is_followed(
    index: Index, data: DataConfig, tmp_path: Path
):
    order = Order.of(0, int(index.rows.sum()), 20)
    (job,) = part_jobs(index, 100)
    write_part(job, data, str(tmp_path), order)
    part = tmp_path / "_part-00000"
    content = part.read_bytes()
    # Two shards and the last one's end, an offset of eight bytes and a checksum of four each; and theirs.
    ending = 3 * 12 + 4
    assert order.shards == 2
    for harmed in flips(content, range(8 * (len(content) - ending), 8 * len(content))):
        part.write_bytes(harmed)
        for shard in range(2):
            with pytest.raises(ValueError, match=f"{part} is damaged; delete it"):
                write_gathered(
                    shard, str(tmp_path), order, parts=1, labelled=True, rows_per_group=5, classes=()
                )
    part.write_bytes(content)
    for shard in range(2):
        write_gathered(shard, str(tmp_path), order, parts=1, labelled=True, rows_per_group=5, classes=())
    assert _keys(str(tmp_path)) == _expected(0, int(index.rows.sum()))


def _png(colour: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (8, 8), colour).save(out, "PNG")
    return out.getvalue()


def _as_parquet(folder: Path) -> str:
    rows = ((_png(n % 256), n // _PER_CLASS, str(n)) for n in range(_CLASSES * _PER_CLASS))
    write_shards(rows, str(folder), rows_per_shard=2 * _PER_CLASS, rows_per_group=_PER_CLASS)
    return str(folder)


def _as_folder(folder: Path) -> str:
    for number in range(_CLASSES * _PER_CLASS):
        path = folder / f"class {number // _PER_CLASS}" / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png(number % 256))
    return str(folder)


def _as_tars(folder: Path) -> str:
    folder.mkdir()
    for label in range(_CLASSES):
        with tarfile.open(folder / f"{label}.tar", "w") as tar:
            for number in range(_PER_CLASS):
                for ending, content in ((".png", _png(number)), (".cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{label}-{number:03}{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder)


def _as_torchvision(folder: Path) -> str:
    return f"torchvision:ImageFolder?root={_as_folder(folder)}"


def _mixing(uri: str) -> Mixing:
    """Measured on small batches and windows, reading every label."""
    data = DataConfig(train=uri)
    index = build_index(uri, data)
    labels = read_labels(index, data, lambda done, of: None)
    plan = Plan(index.rows, seed=0, lanes=2, batch_size=16, window_rows=16)
    found = measure(plan, labels.__getitem__)
    assert found
    return found


@pytest.mark.parametrize("write", [_as_parquet, _as_folder, _as_tars, _as_torchvision])
def test_what_was_stored_by_class_is_mixed_as_by_a_full_shuffle(write: Callable[[Path], str], tmp_path: Path):
    data = DataConfig(train=write(tmp_path / "source"))
    index = build_index(data.train, data)
    dest = str(tmp_path / "packed")
    if index.random_access:
        for job in direct_jobs(index, 0, 50):
            pack_shard(job, data, dest, rows_per_group=8, classes=index.classes)
    else:
        _shuffled(index, data, dest, seed=0, shard=50, part=100)
    found = _mixing(dest)
    # Eight classes evenly: a batch of 16 has 8 * (1 - (7/8)^16) of them, and a pair is of one in 39 / 319.
    assert found.shuffled_classes == pytest.approx(8 * (1 - (7 / 8) ** 16), rel=0.02)
    assert found.shuffled_same_class == pytest.approx(39 / 319)
    assert found.share > 0.9
    assert found.same_class == pytest.approx(found.shuffled_same_class, abs=0.03)
    assert not found.is_poor


def test_stored_by_class_and_packed_in_that_order_it_is_mixed_badly(tmp_path: Path):
    found = _mixing(_as_parquet(tmp_path / "source"))
    assert found.share < 0.5
    assert found.is_poor


def test_an_order_takes_each_row_into_one_shard():
    order = Order.of(11, 1000, 64)
    samples = np.arange(1000)
    ends = order.ends(samples)
    assert np.diff([0, *ends]).tolist() == [64] * 15 + [40]
    # Whoever has only some of the rows puts each into the same shard.
    half = samples[::2]
    both = np.diff([0, *order.ends(half)]) + np.diff([0, *order.ends(samples[1::2])])
    assert both.tolist() == [64] * 15 + [40]
