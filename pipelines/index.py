"""URI to Index: which files hold the images, and in which fragments, read from metadata alone."""

import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int
from pyarrow import fs

from pipelines import storage
from pipelines.choice import held_out_places, packed, sampled_places, unpacked
from pipelines.config import DataConfig
from pipelines.formats import folders, parquet, tars, torchvision_source
from pipelines.formats.base import CONNECTIONS, Files, Layout, Listing, Place
from pipelines.formats.listing import check_unchanged, find_files
from pipelines.storage.checksums import check_whole, seal_parquet

Progress = Callable[[int, int], None]

# What an index holds beside its fragments.
_ABOUT_INDEX = ("uri", "layout", "classes", "no_labels", "passed_over", "label_values", "image_bytes")

# Columns that a choice of rows changes or adds: how many of a fragment's rows are wanted, how many it has,
# and which they are, packed; null where all.
_CHOSEN = ("rows", "fragment_rows", "chosen")

_LABELS = "labels"


@dataclass(frozen=True, eq=False)
class Index:
    """Every fragment of a data set, sorted by path: a row group, a run of samples in a tar, or a file.

    fragments: path, the file's size and when it was written, rows, first_sample, and what the layout needs to
    read one; where not all of its rows are wanted, `chosen` says which, and `fragment_rows` how many it has.
    A sample's number is its row's place in this order, kept by the parts of a split and by a choice: it does
    not depend on who reads it.
    classes: the names of the labels, where the layout has names. no_labels: which image or file has no label,
    where one has none. passed_over: what else lies there and is not read, in one line. label_values: the
    labels that stand for classes 0, 1, ..., where training with labels has counted them. image_bytes: the
    mean of an encoded image of the whole data set, 0 where it is not known without reading. labels: each
    row's, once they have been read (labels.with_labels), -1 where it has none.
    """

    uri: str
    layout: Layout
    fragments: pa.Table
    classes: tuple[str, ...] = ()
    no_labels: str | None = None
    passed_over: str | None = None
    label_values: tuple[int, ...] = ()
    image_bytes: float = 0.0
    labels: Int[np.ndarray, " rows"] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without labels: they say where rows were chosen, and are large beside what was chosen."""
        return {**self.__dict__, "labels": None}

    @property
    def random_access(self) -> bool:
        """Whether each image is read by itself, so that any order of images costs the same."""
        return self.layout in ("folder", "torchvision")

    @property
    def has_labels(self) -> bool:
        """Whether every image has a label, as far as is known without reading it."""
        return self.no_labels is None

    def check_labels(self, what: str, way_out: str) -> None:
        """Raise ValueError, which says what `what` lacks and where, unless every image has a label."""
        if self.no_labels:
            raise ValueError(f"{what} needs labels, and {self.no_labels}; give it one, or {way_out}")

    @property
    def rows(self) -> Int[np.ndarray, " fragments"]:
        return self.fragments["rows"].to_numpy()

    @property
    def first_sample(self) -> Int[np.ndarray, " fragments"]:
        return self.fragments["first_sample"].to_numpy()

    @property
    def rows_read(self) -> Int[np.ndarray, " fragments"]:
        """How many rows each fragment has, wanted or not."""
        chosen = "fragment_rows" in self.fragments.column_names
        return self.fragments["fragment_rows"].to_numpy() if chosen else self.rows

    @property
    def samples(self) -> Int[np.ndarray, " rows"]:
        """The number of each row's sample, ascending."""
        rows = self.rows
        places = np.arange(int(rows.sum())) + np.repeat(self.first_sample - (np.cumsum(rows) - rows), rows)
        if "chosen" not in self.fragments.column_names:
            return places
        ends = np.cumsum(rows)
        chosen, first = self.fragments["chosen"].to_pylist(), self.first_sample.tolist()
        for number, end in enumerate(ends.tolist()):
            if chosen[number] is not None:
                places[end - rows[number] : end] = first[number] + unpacked(chosen[number])
        return places

    @property
    def paths(self) -> list[str]:
        """The files, each once, in the fragments' order."""
        return self.fragments["path"].unique().to_pylist()

    def check_unchanged(self) -> None:
        """Raise ValueError, which names the file, where one is gone or another than when it was listed."""
        if self.layout != "torchvision":
            columns = (self.fragments[name].to_pylist() for name in ("path", "file_bytes", "file_written"))
            check_unchanged(self.uri, dict.fromkeys(map(Place, *columns)))

    def split(self, share: float, seed: int) -> tuple["Index", "Index"]:
        """The index without, and of, `share` of its rows, drawn from each class where labels are known.

        Raises ValueError where there are too few rows.
        """
        try:
            held_out = held_out_places(self.samples, self.labels, share, seed)
        except ValueError as error:
            images = int(self.rows.sum())
            if self.labels is not None and images > 1 and len(np.unique(self.labels)) == images:
                raise ValueError(
                    f"the labels of {self.uri} are all different, so that no class has an image to hold out; "
                    "choose the column with the classes by --data.label-column, or leave out "
                    "evaluation.held_out"
                ) from error
            one = "one image" if self.labels is None else "one image of each class"
            raise ValueError(
                f"{self.uri} has {images} images, too few to hold out {share:.0%} of them and train on {one}"
            ) from error
        kept = np.ones(int(self.rows.sum()), bool)
        kept[held_out] = False
        return self.only(np.flatnonzero(kept)), self.only(held_out)

    def sample(self, count: int | None, seed: int) -> "Index":
        """The index of `count` of its rows, drawn likewise; of all where it has no more, or unset."""
        if count is None or count >= self.rows.sum():
            return self
        return self.only(sampled_places(self.samples, self.labels, count, seed))

    def only(self, rows: Int[np.ndarray, " chosen"]) -> "Index":
        """The index of these rows alone, given by their places in it, ascending."""
        fragment = np.searchsorted(np.cumsum(self.rows), rows, side="right")
        within = self.samples[rows] - self.first_sample[fragment]
        kept, starts, counts = np.unique(fragment, return_index=True, return_counts=True)
        sizes = self.rows_read[kept]
        chosen = [
            None if count == size else packed(within[start : start + count])
            for start, count, size in zip(starts.tolist(), counts.tolist(), sizes.tolist(), strict=True)
        ]
        fragments = self.fragments.take(pa.array(kept))
        fragments = fragments.drop_columns([name for name in _CHOSEN if name in fragments.column_names])
        for name, column in zip(_CHOSEN, (counts, sizes, pa.array(chosen, pa.binary())), strict=True):
            fragments = fragments.append_column(name, pa.array(column))
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, fragments=fragments, labels=labels)

    def to_bytes(self) -> bytes:
        """The index as a Parquet file, for Index.from_bytes."""
        about = {name: getattr(self, name) for name in _ABOUT_INDEX}
        out = io.BytesIO()
        fragments = self.fragments
        if self.labels is not None:
            offsets = pa.array(np.cumsum([0, *self.rows]), pa.int64())
            by_fragment = pa.LargeListArray.from_arrays(offsets, pa.array(self.labels))
            fragments = fragments.append_column(_LABELS, by_fragment)
        fragments = fragments.replace_schema_metadata({"index": json.dumps(about)})
        pq.write_table(fragments, out, write_page_checksum=True)
        seal_parquet(out)
        return out.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Index":
        """The index that to_bytes gave the bytes of; ChecksumError where they are not what it has given."""
        check_whole(content)
        table = pq.read_table(io.BytesIO(content))
        about = json.loads((table.schema.metadata or {})[b"index"])
        about |= {name: tuple(about[name]) for name in ("classes", "label_values")}
        fragments, labels = _whole(table.replace_schema_metadata(None)), None
        if _LABELS in fragments.column_names:
            labels = pc.list_flatten(fragments[_LABELS]).to_numpy()  # pyright: ignore
            fragments = fragments.drop_columns([_LABELS])
        return cls(fragments=fragments, labels=labels, **about)


def build_index(
    uri: str, data: DataConfig, progress: Progress | None = None, *, classes: Sequence[str] = ()
) -> Index:
    """Read the metadata of every file at `uri`; calls progress(done, files) after each.

    The layout is told by the files' endings: see find_files. With `classes` those give the labels of a
    folder's classes their numbers. Raises ValueError, naming the URI, where it does not exist, holds no
    image, or lacks a column.
    """
    try:
        listing, files = _list(uri, data, progress)
    except OSError as error:
        raise ValueError(storage.first_line(error)) from error
    if classes and listing.classes:
        listing = folders.relabel(listing, classes, uri)
    fragments = listing.fragments.filter(pc.field("rows") > 0)
    if not len(fragments):
        raise ValueError(f"{uri} holds no image: its {len(files.places)} files have none")
    rows = fragments["rows"].to_numpy()
    fragments = fragments.append_column("first_sample", pa.array(np.cumsum(rows) - rows))
    fragments = _with_files(fragments, files.places)
    total = listing.image_bytes or sum(place.size for place in files.places)
    return Index(
        uri,
        files.layout,
        _whole(fragments),
        listing.classes,
        listing.no_labels,
        files.passed_over,
        image_bytes=total / int(rows.sum()),
    )


def _with_files(fragments: pa.Table, places: list[Place]) -> pa.Table:
    """The fragments with the size of their file and when it was written."""
    known = {place.path: place for place in places}
    of = [known.get(path) or Place(path, 0) for path in fragments["path"].to_pylist()]
    fragments = fragments.append_column("file_bytes", pa.array([place.size for place in of], pa.int64()))
    return fragments.append_column("file_written", pa.array([place.written for place in of], pa.int64()))


def _whole(fragments: pa.Table) -> pa.Table:
    """The same, each column in one piece.

    Of several, every look-up of a window's rows would first make one, and pickling writes the memory that
    they share once for each.
    """
    return fragments.combine_chunks()


def _list(uri: str, data: DataConfig, progress: Progress | None) -> tuple[Listing, Files]:
    """The fragments at `uri`, and the files that they are in."""
    if uri.startswith(torchvision_source.SCHEME):
        return torchvision_source.index_rows(uri), Files("torchvision", "", [Place(uri, 0)])
    filesystem, _ = storage.resolve(uri)
    files = find_files(uri)
    told = 0

    def done() -> None:
        nonlocal told
        told += 1
        if progress:
            progress(told, len(files.places))

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return _index_files(filesystem, files, data, pool, done), files


def _index_files(
    filesystem: fs.FileSystem, files: Files, data: DataConfig, pool: Executor, done: Callable[[], None]
) -> Listing:
    if files.layout == "parquet":
        return parquet.index_files(filesystem, files, data, pool, done)
    if files.layout == "tar":
        return tars.index_files(filesystem, files.places, data, pool, done)
    return folders.index_files(files, data, done)
