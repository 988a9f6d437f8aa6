"""Windows through Ray Data: the same rows as read in this process, in the same order."""

import time
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.digits import scattered_digits
from pipelines.config import DataConfig
from pipelines.index import Index, build_index
from pipelines.plan import Plan, Window
from pipelines.reader import read_windows
from pipelines.shards import write_shards
from pipelines.stream import map_jobs, stream_windows

pytestmark = pytest.mark.ray

Streamed = tuple[Index, DataConfig, list[Window]]


@pytest.fixture
def shards(tmp_path: Path) -> Streamed:
    """Three shards of digits, and two epochs of windows over two lanes."""
    write_shards(
        scattered_digits(300, held_out=False, seed=2), str(tmp_path), rows_per_shard=100, rows_per_group=40
    )
    data = DataConfig(train=str(tmp_path))
    index = build_index(data.train, data)
    plan = Plan(index.rows, seed=5, lanes=2, batch_size=20, window_rows=50)
    return index, data, list(plan.windows(range(2), 3, 2 * plan.steps_per_epoch))


def test_rows_come_as_they_are_read_here_and_in_order(ray_cluster: None, shards: Streamed) -> None:
    index, data, windows = shards
    streamed = pa.concat_tables(stream_windows(index, data, windows)).combine_chunks()
    read = pa.concat_tables(read_windows(index, data, windows)).combine_chunks()
    assert streamed.equals(read)
    assert streamed.num_rows == sum(window.rows_read for window in windows)


def test_object_that_has_gone_is_named(ray_cluster: None, shards: Streamed) -> None:
    index, data, windows = shards
    Path(index.paths[1]).unlink()
    with pytest.raises(ValueError, match=r"cannot read .*00001\.parquet, row group \d"):
        list(stream_windows(index, data, windows))


def test_a_shard_with_a_flipped_bit_is_named(ray_cluster: None, shards: Streamed) -> None:
    index, data, windows = shards
    path = Path(index.paths[1])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"^cannot read .*00001\.parquet, row group \d: .*CRC checksum.*again"
    ):
        list(stream_windows(index, data, windows))


def test_tables_that_wait_to_be_taken_are_few_and_cost_no_processor_time(
    ray_cluster: None, tmp_path: Path
) -> None:
    jobs = [str(tmp_path / f"job-{number}") for number in range(40)]
    made = map_jobs(jobs, _touch, tasks=2)
    next(made)
    time.sleep(3.0)  # All that is made ahead has been made.
    ahead = sum(Path(job).exists() for job in jobs)
    before = time.process_time()
    time.sleep(2.0)
    assert time.process_time() - before < 1.0
    assert ahead == sum(Path(job).exists() for job in jobs) < 10
    assert sum(1 for _ in made) == len(jobs) - 1
    assert all(Path(job).exists() for job in jobs)


def _touch(job: str) -> pa.Table:
    Path(job).touch()
    return pa.table({"job": [job]})
