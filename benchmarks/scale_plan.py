"""What the index and the plan of a data set that is only on paper cost: seconds, memory, and their growth."""

import io
import multiprocessing
import pickle
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from benchmarks.comparison import Comparison
from pipelines.config import DataConfig
from pipelines.plan import Plan, Window, lanes_of
from pipelines.reader import Reading
from pipelines.sources import Index, build_index

# Images of a shard, in turns, so that windows begin and end anywhere in them.
_ROWS = (950, 1050)

# A case that takes so long is not measured again.
_LONG_SECONDS = 3.0

# Images of which the other layouts' indexes are made.
_ENTRIES = 256

_T = TypeVar("_T")


@dataclass(frozen=True)
class Job:
    """A run on paper, of which one of `workers` is looked at: rank 0, which no other does more than."""

    workers: int
    lanes: int
    batch_size: int
    window_rows: int


@dataclass(frozen=True)
class IndexCost:
    """Seconds of CPU to make an index's forms, and the bytes of each."""

    build_seconds: float
    store_seconds: float
    load_seconds: float
    pickle_seconds: float
    unpickle_seconds: float
    memory_bytes: int
    stored_bytes: int
    pickled_bytes: int


@dataclass(frozen=True)
class WorkerCost:
    """Seconds of CPU of one worker, its peak of memory above that of its imports, and what it serves."""

    unpickle_seconds: float
    first_seconds: float
    epoch_seconds: float
    resume_seconds: float
    peak_bytes: int
    windows: int
    fragments: int

    @property
    def seconds(self) -> float:
        """All that it does for the epoch."""
        return self.unpickle_seconds + self.epoch_seconds


def paper_index(shards: int, groups: int) -> Index:
    """An index as build_index makes it of Parquet files, each of so many row groups."""
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
    """Make the index, store it and load it again; what Ray brings to a worker is left in `pickled`."""
    index, build = _timed(lambda: paper_index(shards, groups))
    stored, store = _timed(index.to_bytes)
    loaded, load = _timed(lambda: Index.from_bytes(stored))
    content, dump = _timed(lambda: pickle.dumps(loaded, protocol=5))
    _, undump = _timed(lambda: pickle.loads(content))
    pickled.write_bytes(content)
    return IndexCost(build, store, load, dump, undump, loaded.fragments.nbytes, len(stored), len(content))


def worker_cost(job: Job, pickled: Path) -> WorkerCost:
    """What rank 0 does: take the index, list an epoch's windows, and list again from another's middle."""
    _list(paper_index(2, 1), islice(Plan(np.array(_ROWS), 0, 1, 1, 1).windows(range(1), 0, 1), 1))  # Warm up.
    Path("/proc/self/clear_refs").write_text("5")  # Start the peak anew.
    before = _status("VmRSS")
    index, unpickle = _timed(lambda: pickle.loads(pickled.read_bytes()))
    plan = Plan(index.rows, 0, job.lanes, job.batch_size, job.window_rows)
    lanes, steps = lanes_of(0, job.workers, job.lanes), plan.steps_per_epoch

    windows = plan.windows(lanes, 0, steps)
    turn, first = _timed(lambda: list(islice(windows, len(lanes))))
    (count, fragments), rest = _timed(lambda: _list(index, chain(turn, windows)))
    middle = plan.windows(lanes, steps + steps // 2, 2 * steps)
    _, resume = _timed(lambda: _list(index, islice(middle, len(lanes))))
    return WorkerCost(unpickle, first, first + rest, resume, _status("VmHWM") - before, count, fragments)


def _list(index: Index, windows: "chain[Window] | islice[Window]") -> tuple[int, int]:
    """Look up what is read for each of the windows; how many windows and pieces there are."""
    count = pieces = 0
    for window in windows:
        if window.pieces:
            pieces += len(Reading.of(index, window.pieces).pieces)
        count += 1
    return count, pieces


def _timed(work: Callable[[], _T]) -> tuple[_T, float]:
    """What `work` gives, and its seconds of CPU: others may be at work on the machine."""
    started = time.process_time()
    result = work()
    return result, time.process_time() - started


def _status(key: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def print_simulation(
    shards: list[int], workers: list[int], job: Job, *, groups: int, rounds: int
) -> dict[tuple[int, int], WorkerCost]:
    """What the index costs by shards, and a worker by shards and workers."""
    indexes, costs = _simulate(shards, workers, job, groups=groups, rounds=rounds)
    _print_index(indexes, groups)
    _print_workers(costs, job)
    for layout, each in _entry_bytes().items():
        print(f"the index of a {layout} takes {each:.0f} bytes an image, {each:.0f} GB for 1e9")
    return costs


def growth(costs: dict[tuple[int, int], WorkerCost]) -> list[Comparison]:
    """What a shard costs a worker, against what it does where there are a tenth of them."""
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


def _print_index(costs: dict[int, IndexCost], groups: int) -> None:
    print(
        f"\nThe index on paper, {groups} row groups a shard: seconds of CPU, and MB\n"
        "    shards         images    made    stored, MB      loaded, MB     pickled, MB     unpickled"
    )
    for shards, cost in costs.items():
        print(
            f"{shards:10,} {shards * 1000:14,} {cost.build_seconds:7.3f} {cost.store_seconds:7.3f} "
            f"{cost.stored_bytes / 1e6:6.1f} {cost.load_seconds:7.3f} {cost.memory_bytes / 1e6:6.1f} "
            f"{cost.pickle_seconds:8.3f} {cost.pickled_bytes / 1e6:6.1f} {cost.unpickle_seconds:8.3f}"
        )


def _print_workers(costs: dict[tuple[int, int], WorkerCost], job: Job) -> None:
    print(
        f"\nOne worker on paper, {job.lanes:,} lanes, batches of {job.batch_size:,}, windows of "
        f"{job.window_rows:,}: seconds of CPU, MB at the peak,\nboth against a tenth of the shards. Of an "
        "epoch: row groups, windows, seconds with the index's arrival\n"
        "workers     shards   row groups   windows    index  1st batch    epoch  resumed      MB  growth"
    )
    for shards, workers in sorted(costs, key=lambda case: (case[1], case[0])):
        cost, tenth = costs[shards, workers], costs.get((shards // 10, workers))
        growth = (cost.seconds / tenth.seconds, cost.peak_bytes / tenth.peak_bytes) if tenth else ()
        print(
            f"{workers:7,} {shards:10,} {cost.fragments:12,} {cost.windows:9,} {cost.unpickle_seconds:8.3f} "
            f"{cost.first_seconds:10.3f} {cost.seconds:8.3f} {cost.resume_seconds:8.3f} "
            f"{cost.peak_bytes / 1e6:7.1f}  {', '.join(f'{factor:.1f}' for factor in growth)}"
        )


def _simulate(
    shards: list[int], workers: list[int], job: Job, *, groups: int, rounds: int
) -> tuple[dict[int, IndexCost], dict[tuple[int, int], WorkerCost]]:
    """The cost of the index by shards, and of a worker by shards and workers; each in a fresh process."""
    indexes, costs = {}, {}
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool,
    ):
        pickled = Path(folder, "index")
        for count in shards:
            indexes[count] = pool.apply(index_cost, (count, groups, pickled))
            for number in workers:
                case = replace(job, workers=number)
                costs[count, number] = _median(
                    lambda case=case: pool.apply(worker_cost, (case, pickled)), rounds
                )
    return indexes, costs


def _median(measure: Callable[[], WorkerCost], rounds: int) -> WorkerCost:
    """Of each cost the median, of one round where that takes long."""
    found = [measure()]
    while len(found) < rounds and found[0].seconds < _LONG_SECONDS:
        found.append(measure())
    names = WorkerCost.__dataclass_fields__
    return WorkerCost(**{name: statistics.median(getattr(cost, name) for cost in found) for name in names})


def _entry_bytes() -> dict[str, float]:
    """Bytes of the index for each image of a tar, and for each image file in a folder."""
    images = [b"image"] * _ENTRIES
    with tempfile.TemporaryDirectory() as folder:
        tar, files = Path(folder, "tar", "train-000000.tar"), Path(folder, "files", "class")
        for place in (tar.parent, files):
            place.mkdir(parents=True)
        with tarfile.open(tar, "w") as out:
            for number, image in enumerate(images):
                member = tarfile.TarInfo(f"{number:09}.png")
                member.size = len(image)
                out.addfile(member, io.BytesIO(image))
                (files / member.name).write_bytes(image)
        places = {"tar": str(tar), "folder": str(files.parent)}
        indexes = {name: build_index(place, DataConfig(train=place)) for name, place in places.items()}
    return {name: index.fragments.nbytes / len(images) for name, index in indexes.items()}
