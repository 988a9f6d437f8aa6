"""The index of a data set: its files and their fragments, found from metadata alone."""

import io
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int
from pyarrow import fs

from pipelines import compact, storage
from pipelines.choice import held_out_places, packed, sampled_places, unpacked
from pipelines.config import DataConfig
from pipelines.formats import folders, parquet, tars, torchvision_source
from pipelines.formats.base import CONNECTIONS, Files, Layout, Listing, Place
from pipelines.formats.listing import check_unchanged, find_files
from pipelines.storage.checksums import check_whole, seal_parquet

Progress = Callable[[int, int], None]

# The fields of an index that are stored beside its fragments and labels.
_ABOUT_INDEX = ("uri", "layout", "classes", "no_labels", "passed_over", "label_values", "image_bytes")

# Columns that a choice of rows changes or adds: the number of chosen rows of a fragment, of all its rows, and
# the positions of the chosen rows, packed; null if all are chosen.
_CHOSEN = ("rows", "fragment_rows", "chosen")

_LABELS = "labels"


@dataclass(frozen=True, eq=False)
class Index:
    """All fragments of a data set, sorted by path: row groups, runs of samples in a tar, or files.

    fragments: path, the file's size and modification time, rows, first_sample, and the columns with which the
    layout reads a fragment. If only some rows are chosen, `chosen` has their positions, and `fragment_rows`
    the number of all. `compacted` leaves out columns: use the methods, not the columns, where workers do.
    A sample number is the position of a row in the whole data set. A split or a choice keeps it, so it does
    not depend on who reads the row.
    classes: the names of the labels, if the layout has names. no_labels: the first image or file without a
    label, if any. passed_over: one line about other files there, which are not read. label_values: the labels
    of classes 0, 1, ..., once training with labels has counted them. image_bytes: mean size of an encoded
    image of the whole data set; 0 if unknown. labels: the label of each row, once they have been read
    (labels.with_labels); -1 for none.
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
        """Without labels: they are only needed to choose rows, and large."""
        return {**self.__dict__, "labels": None}

    @property
    def random_access(self) -> bool:
        """Whether images are read one by one, so that any order of images costs the same."""
        return self.layout in ("folder", "torchvision")

    @property
    def has_labels(self) -> bool:
        """Whether every image has a label, as far as known without reading it."""
        return self.no_labels is None

    def check_labels(self, what: str, way_out: str) -> None:
        """Raise ValueError, naming `what` and the first image without a label, unless all have one."""
        if self.no_labels:
            raise ValueError(f"{what} needs labels, and {self.no_labels}; give it one, or {way_out}")

    def compacted(self) -> "Index":
        """The same rows for workers, with a fraction of the memory if the layout is a folder.

        Without the sizes and times of files: check_unchanged and to_bytes need the original.
        """
        return replace(self, fragments=compact.compacted(self.fragments))

    @property
    def rows(self) -> Int[np.ndarray, " fragments"]:
        """The number of chosen rows of each fragment."""
        if compact.is_compact(self.fragments):
            return np.ones(len(self.fragments), np.int64)
        return self.fragments["rows"].to_numpy()

    @property
    def first_sample(self) -> Int[np.ndarray, " fragments"]:
        """The sample number of the first row, chosen or not, of each fragment."""
        if "first_sample" not in self.fragments.column_names:
            return np.arange(len(self.fragments))
        return self.fragments["first_sample"].to_numpy().astype(np.int64, copy=False)

    @property
    def rows_read(self) -> Int[np.ndarray, " fragments"]:
        """The number of rows of each fragment, chosen or not."""
        chosen = "fragment_rows" in self.fragments.column_names
        return self.fragments["fragment_rows"].to_numpy() if chosen else self.rows

    @property
    def samples(self) -> Int[np.ndarray, " rows"]:
        """The sample number of each row, ascending."""
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
        """The files, each once, in the order of the fragments."""
        return compact.expanded(self.fragments)["path"].unique().to_pylist()

    def taken(self, fragments: Sequence[int]) -> pa.Table:
        """These fragments with all columns that reading needs, compacted or not."""
        places = pa.array(fragments, pa.int64())
        rows = compact.expanded(self.fragments.take(places))
        if "first_sample" in rows.column_names:
            return rows
        return rows.append_column("first_sample", places)

    def holding(self, paths: Iterable[str]) -> set[str]:
        """Those of `paths` that are files of this index, in one pass over its fragments."""
        return compact.found(self.fragments, set(paths))

    def check_unchanged(self) -> None:
        """Raise ValueError, naming the file, if a file is missing or has changed since it was listed."""
        if self.layout != "torchvision":
            columns = (self.fragments[name].to_pylist() for name in ("path", "file_bytes", "file_written"))
            check_unchanged(self.uri, dict.fromkeys(map(Place, *columns)))

    def split(self, share: float, seed: int) -> tuple["Index", "Index"]:
        """The index without `share` of its rows, and of these; drawn from each class if labels are known.

        Raises ValueError if there are too few rows.
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
        """The index of `count` rows, drawn in the same way; of all rows if unset or if there are no more."""
        if count is None or count >= self.rows.sum():
            return self
        return self.only(sampled_places(self.samples, self.labels, count, seed))

    def only(self, rows: Int[np.ndarray, " chosen"]) -> "Index":
        """The index of these rows, given by their positions in it, ascending."""
        labels = None if self.labels is None else self.labels[rows]
        if compact.is_compact(self.fragments):
            return replace(self, fragments=compact.chosen(self.fragments, rows), labels=labels)
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
        return replace(self, fragments=fragments, labels=labels)

    def to_bytes(self) -> bytes:
        """The index as the content of a Parquet file, which from_bytes reads."""
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
        """The inverse of to_bytes. Raises ChecksumError if the bytes are damaged."""
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
    """Read the metadata of every file at `uri`; calls progress(done, files), for a folder of images once.

    While files are listed in S3, `files` is the number found so far. The endings of the files determine the
    layout: see find_files. `classes` gives the class folders their label numbers; unset: sorted by name.
    Raises ValueError, naming the URI, if it does not exist, has no image, or lacks a column.
    """
    try:
        listing, files = _list(uri, data, progress)
    except OSError as error:
        raise ValueError(storage.first_line(error)) from error
    if classes and listing.classes:
        listing = folders.relabel(listing, classes, uri)
    fragments = listing.fragments
    if files.layout != "folder":
        fragments = fragments.filter(pc.field("rows") > 0)
    if not len(fragments):
        raise ValueError(f"{uri} holds no image: its {len(files.paths)} files have none")
    rows = fragments["rows"].to_numpy()
    fragments = fragments.append_column("first_sample", pa.array(np.cumsum(rows) - rows))
    fragments = _with_files(fragments, files)
    total = listing.image_bytes or sum(files.sizes)
    return Index(
        uri,
        files.layout,
        _whole(fragments),
        listing.classes,
        listing.no_labels,
        files.passed_over,
        image_bytes=total / int(rows.sum()),
    )


def _with_files(fragments: pa.Table, files: Files) -> pa.Table:
    """The fragments with the size and modification time of their files; 0 for what is no file."""
    columns = {"file_bytes": pa.array(files.sizes), "file_written": pa.array(files.written)}
    if files.layout != "folder":  # There each file is a fragment.
        file = pc.index_in(fragments["path"], value_set=pa.array(files.paths))  # pyright: ignore
        columns = {name: column.take(file.combine_chunks()) for name, column in columns.items()}
    for name, column in columns.items():
        fragments = fragments.append_column(name, column.cast(pa.int64()).fill_null(0))
    return fragments


def _whole(fragments: pa.Table) -> pa.Table:
    """The fragments with each column in one chunk.

    Arrow would join several chunks at each look-up, and pickle the memory that they share once per chunk.
    """
    return fragments.combine_chunks()


def _list(uri: str, data: DataConfig, progress: Progress | None) -> tuple[Listing, Files]:
    """The fragments at `uri`, and their files."""
    if uri.startswith(torchvision_source.SCHEME):
        return torchvision_source.index_rows(uri), Files("torchvision", "", [uri], [0], [0])
    filesystem, _ = storage.resolve(uri)
    files = find_files(uri, (lambda found: progress(0, found)) if progress else None)
    told = 0

    def done(count: int = 1) -> None:
        nonlocal told
        told += count
        if progress:
            progress(told, len(files.paths))

    if files.layout == "folder":
        listing = folders.index_files(files, data)
        done(len(files.paths))
        return listing, files
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return _index_files(filesystem, files, data, pool, done), files


def _index_files(
    filesystem: fs.FileSystem, files: Files, data: DataConfig, pool: Executor, done: Callable[[], None]
) -> Listing:
    if files.layout == "parquet":
        return parquet.index_files(filesystem, files, data, pool, done)
    return tars.index_files(filesystem, files.places, data, pool, done)
