"""Views of images streamed from object storage, against the same DALI pipeline fed from memory.

    python benchmarks/stream.py PHOTOGRAPHS    # a Parquet file or folder with the columns image and label

Packs the images, several times over, into a bucket of a real S3 server on this machine. Two workers make two
views of each: from tables in memory, and streamed through Ray Data. The two take turns in one run. Prints
the ratio of their rates, the time to the first batch, and the peak memory for a small and a large data set.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from benchmarks.comparison import Comparison, add_json_option, write_json
from cluster.objectstore import s3_server
from cluster.ray_cluster import cluster
from pipelines.config import DataConfig
from pipelines.feed import Device, training_views
from pipelines.index import Index, build_index
from pipelines.plan import Plan, lanes_of
from pipelines.reader import read_windows
from pipelines.shards import write_shards
from pipelines.stream import stream_windows

_BUCKET = "diptych-benchmark"
_WORKERS = 2


@ray.remote(num_cpus=1)
class _Worker:
    """Makes the views of its lanes, as a training worker does."""

    def __init__(self, rank: int, index: Index, data: DataConfig, plan: Plan, threads: int) -> None:
        self._lanes = lanes_of(rank, _WORKERS, plan.lanes)
        self._index, self._data, self._plan, self._threads = index, data, plan, threads
        torch.set_num_threads(1)

    def run(self, source: str, steps: int) -> dict[str, float]:
        """Images a second from the first batch on, seconds to that batch, and this process's peak memory."""
        windows = list(self._plan.windows(self._lanes, 0, steps))
        tables: Iterable[pa.Table] = (
            list(read_windows(self._index, self._data, windows))
            if source == "memory"
            else stream_windows(self._index, self._data, windows)
        )
        started = time.perf_counter()
        views = self._views(tables, steps)
        next(views)
        first = time.perf_counter()
        images = sum(len(batch.samples) for batch in views)
        return {
            "rate": images / (time.perf_counter() - first),
            "first_batch": first - started,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }

    def _views(self, tables: Iterable[pa.Table], steps: int) -> Iterator:
        return training_views(
            tables, self._plan, self._lanes, (self._data.view, self._data.view), Device(self._threads),
            start_step=0, stop_step=steps,
        )  # fmt: skip


def _pack(photographs: str, uri: str, times: int) -> None:
    table = pq.read_table(photographs, columns=["image", "label"])
    rows = zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True)
    encoded = [(row["bytes"] if isinstance(row, dict) else row, label) for row, label in rows]
    repeated = ((*row, f"{time}/{n}") for time in range(times) for n, row in enumerate(encoded))
    write_shards(repeated, uri, rows_per_shard=512, rows_per_group=64)


def _measure(uri: str, batch_size: int, steps: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    data = DataConfig(train=uri, window_rows=128)
    index = build_index(uri, data)
    plan = Plan(index.rows, seed=0, lanes=2 * _WORKERS, batch_size=batch_size, window_rows=data.window_rows)
    workers = [_Worker.remote(rank, index, data, plan, 1) for rank in range(_WORKERS)]
    found: dict[str, list[dict[str, float]]] = {"memory": [], "stream": []}
    for _ in range(rounds):
        for source, results in found.items():
            shares = ray.get([worker.run.remote(source, steps) for worker in workers])
            results.append(
                {
                    "rate": sum(share["rate"] for share in shares),
                    "first_batch": max(share["first_batch"] for share in shares),
                    "peak_mib": max(share["peak_mib"] for share in shares),
                }
            )
            print(f"  {source:<7} {results[-1]['rate']:7.1f} images/s", flush=True)
    for worker in workers:
        ray.kill(worker)
    return found


def _peak(uri: str, batch_size: int, steps: int) -> float:
    """Peak memory of the larger of two fresh workers that only stream, in MiB."""
    data = DataConfig(train=uri, window_rows=128)
    index = build_index(uri, data)
    plan = Plan(index.rows, seed=0, lanes=2 * _WORKERS, batch_size=batch_size, window_rows=data.window_rows)
    workers = [_Worker.remote(rank, index, data, plan, 1) for rank in range(_WORKERS)]
    steps = min(steps, plan.steps_per_epoch)
    shares = ray.get([worker.run.remote("stream", steps) for worker in workers])
    for worker in workers:
        ray.kill(worker)
    return max(share["peak_mib"] for share in shares)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("photographs", help="a Parquet file or a folder of them")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    add_json_option(parser)
    arguments = parser.parse_args()
    cpus = _WORKERS * 2
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder), bucket=_BUCKET), cluster(cpus):
        small, large = f"s3://{_BUCKET}/small", f"s3://{_BUCKET}/large"
        _pack(arguments.photographs, small, 4)
        _pack(arguments.photographs, large, 16)
        found = _measure(large, arguments.batch_size, arguments.steps, arguments.rounds)
        rates = [[result["rate"] for result in found[source]] for source in ("stream", "memory")]
        streamed = Comparison(
            "from S3 through Ray Data to views", "from memory", "images/s", *rates, more_is_better=True
        )
        ratios = sorted(streamed.ratios)
        print(f"stream / memory: median {statistics.median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}")
        for source, results in found.items():
            firsts = ", ".join(f"{result['first_batch']:.1f}" for result in results)
            print(f"first batch from {source}: {firsts} s")
        peaks = [_peak(uri, arguments.batch_size, 10**9) for uri in (small, large)]
        for name, peak in zip(("small", "large, 4 times as many images"), peaks, strict=True):
            print(f"peak memory of a worker, {name}: {peak:,.0f} MiB")
    memory = Comparison(
        "a worker's memory, 4 times the images", "a quarter of them", "MiB", peaks[1:], peaks[:1]
    )
    write_json(arguments.json, [streamed, memory])


if __name__ == "__main__":
    main()
