"""Index and plan of up to 1e9 images in 1e6 shards: time and memory grow with the shards alone.

    python benchmarks/plan.py    # 2 minutes on two cores

The shards exist only as an index: no image is made or read. Measures what the index costs to store, load and
send, and what one worker of 1 to 1,024 does for an epoch: it receives the index, lists its windows, and looks
up what is read for each; and it lists again from the middle of the next epoch, as a resumed run does. Seconds
of CPU, and memory at the peak above what imports take, each in a fresh process. Prints both against those of
a tenth of the shards, and the index's bytes for each image of tars and folders, which have an entry an image.
"""

import argparse
import io
import multiprocessing
import os
import pickle
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from importlib.metadata import version
from itertools import chain, islice
from multiprocessing.pool import Pool
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from benchmarks.comparison import Comparison, add_json_option, write_json
from benchmarks.memory import peak, start_peak
from pipelines.config import DataConfig
from pipelines.index import Index, build_index
from pipelines.plan import Plan, Window, lanes_of
from pipelines.reader import Reading

# Images of a shard, in turns, so that windows begin and end anywhere in them.
_ROWS = (950, 1050)

_WINDOW_ROWS = 1024

# A measurement that takes longer is not repeated.
_LONG_SECONDS = 3.0

# Images of which the indexes of a tar and of a folder are made.
_ENTRIES = 256

_INDEX_HEADER = """
The index, {groups} row groups a shard: seconds of CPU, and MB
    shards         images    made    stored, MB      loaded, MB     pickled, MB     unpickled"""

_WORKER_HEADER = """
One worker, {lanes:,} lanes, batches of {batch:,}, windows of {rows:,}: seconds of CPU, MB at the peak, and
both against a tenth of the shards. Of an epoch: row groups, windows, seconds with the index's arrival
workers     shards   row groups   windows    index  1st batch    epoch  resumed      MB  growth"""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Job:
    """A run, of which rank 0 is measured: no other rank has more to do."""

    workers: int
    lanes: int
    batch_size: int


@dataclass(frozen=True)
class IndexCost:
    """Seconds of CPU to make each form of an index, and the bytes of each."""

    build_seconds: float
    store_seconds: float
    stored_bytes: int
    load_seconds: float
    loaded_bytes: int
    pickle_seconds: float
    pickled_bytes: int
    unpickle_seconds: float


@dataclass(frozen=True)
class WorkerCost:
    """Seconds of CPU of one worker, its peak of memory above that of its imports, and what it reads."""

    fragments: int
    windows: int
    unpickle_seconds: float
    first_seconds: float
    epoch_seconds: float
    resume_seconds: float
    peak_bytes: int

    @property
    def seconds(self) -> float:
        """For the whole epoch, the arrival of the index included."""
        return self.unpickle_seconds + self.epoch_seconds


def paper_index(shards: int, groups: int) -> Index:
    """An index as build_index makes it of Parquet files, each with so many row groups."""
    # The parts of a number n that are (n + i) // groups add up to it.
    rows = ((np.resize(np.array(_ROWS), shards)[:, None] + np.arange(groups)) // groups).ravel()
    paths = pa.array(f"bucket/images/train-{n:08}.parquet" for n in range(shards))
    table = {
        "path": paths.take(pa.array(np.repeat(np.arange(shards), groups))),
        "rows": rows,
        "row_group": np.tile(np.arange(groups), shards),
        "first_sample": np.cumsum(rows) - rows,
    }
    return Index("s3://bucket/images", "parquet", pa.table(table))


def index_cost(shards: int, groups: int, pickled: Path) -> IndexCost:
    """Make an index, store it and load it again; the form that Ray sends to workers is left in `pickled`."""
    index, build = _timed(lambda: paper_index(shards, groups))
    stored, store = _timed(index.to_bytes)
    loaded, load = _timed(lambda: Index.from_bytes(stored))
    content, dump = _timed(lambda: pickle.dumps(loaded, protocol=5))
    _, undump = _timed(lambda: pickle.loads(content))
    pickled.write_bytes(content)
    return IndexCost(build, store, len(stored), load, loaded.fragments.nbytes, dump, len(content), undump)


def worker_cost(job: Job, pickled: Path) -> WorkerCost:
    """Receive the index, list an epoch's windows, and list again from the middle of the next."""
    _list(paper_index(2, 1), islice(Plan(np.array(_ROWS), 0, 1, 1, 1).windows(range(1), 0, 1), 1))  # Warm up.
    before = start_peak()
    index, unpickle = _timed(lambda: pickle.loads(pickled.read_bytes()))
    plan = Plan(index.rows, 0, job.lanes, job.batch_size, _WINDOW_ROWS)
    lanes, steps = lanes_of(0, job.workers, job.lanes), plan.steps_per_epoch

    windows = plan.windows(lanes, 0, steps)
    turn, first = _timed(lambda: list(islice(windows, len(lanes))))
    (count, fragments), rest = _timed(lambda: _list(index, chain(turn, windows)))
    middle = plan.windows(lanes, steps + steps // 2, 2 * steps)
    _, resume = _timed(lambda: _list(index, islice(middle, len(lanes))))
    return WorkerCost(fragments, count, unpickle, first, first + rest, resume, peak() - before)


def _list(index: Index, windows: Iterable[Window]) -> tuple[int, int]:
    """Look up what is read for each window; the numbers of windows and of pieces."""
    count = pieces = 0
    for window in windows:
        if window.pieces:
            pieces += len(Reading.of(index, window.pieces).pieces)
        count += 1
    return count, pieces


def _timed(work: Callable[[], _T]) -> tuple[_T, float]:
    """The result, and the seconds of CPU: other work on the machine does not count."""
    started = time.process_time()
    result = work()
    return result, time.process_time() - started


def _entry_bytes() -> dict[str, float]:
    """Bytes of the index for each image of a tar, and for each image file of a folder."""
    with tempfile.TemporaryDirectory() as folder:
        tar, files = Path(folder, "tar", "train-000000.tar"), Path(folder, "files", "class")
        for place in (tar.parent, files):
            place.mkdir(parents=True)
        with tarfile.open(tar, "w") as out:
            for number in range(_ENTRIES):
                member = tarfile.TarInfo(f"{number:09}.png")
                member.size = len(b"image")
                out.addfile(member, io.BytesIO(b"image"))
                (files / member.name).write_bytes(b"image")
        places = {"tar": str(tar), "folder": str(files.parent)}
        indexes = {name: build_index(place, DataConfig(train=place)) for name, place in places.items()}
    return {name: index.fragments.nbytes / _ENTRIES for name, index in indexes.items()}


def _worker_costs(
    arguments: argparse.Namespace, pool: Pool, pickled: Path
) -> dict[tuple[int, int], WorkerCost]:
    """By shards and workers; the indexes' costs are printed on the way."""
    print(_INDEX_HEADER.format(groups=arguments.groups))
    costs = {}
    for shards in arguments.shards:
        index = pool.apply(index_cost, (shards, arguments.groups, pickled))
        _print_index(shards, index)
        for workers in arguments.serving:
            job = Job(workers, arguments.lanes, arguments.batch_size)
            costs[shards, workers] = _median(pool, job, pickled, arguments.rounds)
    return costs


def _median(pool: Pool, job: Job, pickled: Path, rounds: int) -> WorkerCost:
    """The median of each cost; of one round where that takes long."""
    found = [pool.apply(worker_cost, (job, pickled))]
    while len(found) < rounds and found[0].seconds < _LONG_SECONDS:
        found.append(pool.apply(worker_cost, (job, pickled)))
    return WorkerCost(*map(statistics.median, zip(*map(astuple, found), strict=True)))


def _print_index(shards: int, cost: IndexCost) -> None:
    print(
        f"{shards:10,} {shards * 1000:14,} {cost.build_seconds:7.3f} {cost.store_seconds:7.3f} "
        f"{cost.stored_bytes / 1e6:6.1f} {cost.load_seconds:7.3f} {cost.loaded_bytes / 1e6:6.1f} "
        f"{cost.pickle_seconds:8.3f} {cost.pickled_bytes / 1e6:6.1f} {cost.unpickle_seconds:8.3f}",
        flush=True,
    )


def _print_workers(arguments: argparse.Namespace, costs: dict[tuple[int, int], WorkerCost]) -> None:
    print(_WORKER_HEADER.format(lanes=arguments.lanes, batch=arguments.batch_size, rows=_WINDOW_ROWS))
    for shards, workers in sorted(costs, key=lambda case: (case[1], case[0])):
        cost, tenth = costs[shards, workers], costs.get((shards // 10, workers))
        growth = (
            f"{cost.seconds / tenth.seconds:.1f}, {cost.peak_bytes / tenth.peak_bytes:.1f}" if tenth else ""
        )
        print(
            f"{workers:7,} {shards:10,} {cost.fragments:12,} {cost.windows:9,} {cost.unpickle_seconds:8.3f} "
            f"{cost.first_seconds:10.3f} {cost.seconds:8.3f} {cost.resume_seconds:8.3f} "
            f"{cost.peak_bytes / 1e6:7.1f}  {growth}"
        )


def _growth(costs: dict[tuple[int, int], WorkerCost]) -> list[Comparison]:
    """The cost of a shard to a worker, against that where there are a tenth of the shards."""
    found = []
    for (shards, workers), cost in costs.items():
        if tenth := costs.get((shards // 10, workers)):
            whose, peer = f"one of {workers:,} workers, {shards:,} shards", f"{shards // 10:,} shards"
            times = [[1e6 * each / n] for each, n in ((cost.seconds, shards), (tenth.seconds, shards // 10))]
            memory = [[each / n] for each, n in ((cost.peak_bytes, shards), (tenth.peak_bytes, shards // 10))]
            found += [
                Comparison(f"an epoch's plan for {whose}", peer, "us of CPU a shard", *times),
                Comparison(f"memory of the plan for {whose}", peer, "bytes a shard", *memory),
            ]
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--shards", type=int, nargs="+", default=[10**4, 10**5, 10**6], help="of 1,000 images each")
    add("--groups", type=int, default=1, help="row groups of a shard")
    add("--serving", type=int, nargs="+", default=[1, 8, 64, 512, 1024], help="workers that share the shards")
    add("--lanes", type=int, default=1024)
    add("--batch-size", type=int, default=4096)
    add("--rounds", type=int, default=3)
    add_json_option(parser)
    arguments = parser.parse_args()
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "pyarrow"))
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {packages}")
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool,
    ):
        costs = _worker_costs(arguments, pool, Path(folder, "index"))
    _print_workers(arguments, costs)
    for layout, each in _entry_bytes().items():
        print(f"the index of a {layout} takes {each:.0f} bytes an image, {each:.0f} GB for 1e9")
    write_json(arguments.json, _growth(costs))


if __name__ == "__main__":
    main()
