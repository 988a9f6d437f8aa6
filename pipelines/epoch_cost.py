"""The requests and bytes that an epoch asks of object storage, counted from the plan of a run."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from pipelines.formats.parquet import END_BYTES
from pipelines.index import Index
from pipelines.plan import Plan
from pipelines.reader import Reading

# A file's size is asked for when it is opened, then each range is a request.
_OPEN = 1

# pyarrow joins neighbouring ranges of a Parquet file up to this size.
_RANGE_BYTES = 32 << 20

# The requests and bytes of the pieces of a window.
_Count = Callable[[list[dict]], tuple[int, float]]


@dataclass(frozen=True)
class EpochCost:
    """Requests and bytes that an epoch asks of object storage, without those repeated after errors.

    price: of the requests.
    """

    images: int
    requests: int
    bytes: int
    price: float

    def __str__(self) -> str:
        requests, size = self.requests / self.images, self.bytes / self.images
        total = f"{self.requests:,} requests for {self.price:,.2f}, and {self.bytes / 2**30:,.2f} GiB"
        return f"{total}; {requests:.3g} requests and {size:,.0f} bytes per image"


def epoch_cost(index: Index, plan: Plan, *, price: float, readers: int = 1) -> EpochCost | None:
    """Count the requests and bytes of the first epoch of `plan`; None for torchvision's data sets.

    index: of all rows. price: of 1,000 requests. readers: processes that read, each of which reads the footer
    of a Parquet file once. Bytes of Parquet files include columns that training does not read.
    """
    if index.layout == "torchvision":
        return None
    count: _Count = _row_groups(index) if index.layout == "parquet" else _COUNTS[index.layout]
    images, requests, size = 0, 0, 0.0
    for window in plan.windows(range(plan.lanes), 0, plan.steps_per_epoch):
        images += window.rows
        if window.pieces:
            more = count(Reading.of(index, window.pieces).pieces.to_pylist())
            requests, size = requests + more[0], size + more[1]
    if index.layout == "parquet":
        footers = [min(END_BYTES, held) for held in _file_bytes(index).values()]
        requests, size = requests + readers * len(footers), size + readers * sum(footers)
    return EpochCost(images, requests, round(size), requests / 1000 * price)


def _file_bytes(index: Index) -> dict[str, int]:
    """The size of each file of the index."""
    columns = (index.fragments[name].to_pylist() for name in ("path", "file_bytes"))
    return dict(zip(*columns, strict=True))


def _files(pieces: list[dict]) -> tuple[int, float]:
    return (_OPEN + 1) * len(pieces), sum(piece["file_bytes"] for piece in pieces)


def _spans(pieces: list[dict]) -> tuple[int, float]:
    """Each piece of a tar is read from its first to its last image."""
    size = 0
    for piece in pieces:
        samples = piece["samples"][piece["start"] : piece["stop"]]
        ends = [sample["offset"] + sample["size"] for sample in samples]
        size += max(ends) - min(sample["offset"] for sample in samples)
    return (_OPEN + 1) * len(pieces), size


_COUNTS: dict[str, _Count] = {"folder": _files, "tar": _spans}


def _row_groups(index: Index) -> _Count:
    """The count for Parquet files, whose row groups are taken to have the same bytes per row."""
    rows = Counter[str]()
    for path, held in zip(index.fragments["path"].to_pylist(), index.rows_read.tolist(), strict=True):
        rows[path] += held
    per_row = {path: size / rows[path] for path, size in _file_bytes(index).items()}

    def count(pieces: list[dict]) -> tuple[int, float]:
        groups = {
            (piece["path"], piece["row_group"]): piece["rows"] * per_row[piece["path"]] for piece in pieces
        }
        requests, end, joined = _OPEN * len({path for path, _ in groups}), ("", -1), 0.0
        for (path, group), size in sorted(groups.items()):
            joined = joined + size if (path, group - 1) == end else 0.0
            if not joined or joined > _RANGE_BYTES:
                requests, joined = requests + 1, size
            end = path, group
        return requests, sum(groups.values())

    return count
