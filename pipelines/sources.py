"""URI to Index: which files hold the images, and in which fragments, read from metadata alone."""

import io
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int
from pyarrow import fs

from pipelines import folders, parquet, storage, tars, torchvision_source
from pipelines.config import DataConfig
from pipelines.layout import CONNECTIONS, Listing, Place
from pipelines.philox import derive_key, permutation

Layout = Literal["parquet", "tar", "folder", "torchvision"]
Progress = Callable[[int, int], None]

# The first layout of which a folder has files is the folder's.
_ENDINGS: dict[Layout, tuple[str, ...]] = {
    "parquet": parquet.ENDINGS,
    "tar": tars.ENDINGS,
    "folder": folders.ENDINGS,
}

# First part of a key's path; pipelines.plan and pipelines.draws use others.
_SPLIT = 4

# A split into whole fragments may hold out so many times what was asked for.
_ABOUT = 1.5


@dataclass(frozen=True, eq=False)
class Index:
    """Every fragment of a data set, sorted by path: a row group, a run of samples in a tar, or a file.

    fragments: path, rows, first_sample, and what the layout needs to read one; `chosen`, where not all of its
    rows are wanted, says which. A sample's number is its row's place in this order, kept by the parts of a
    split and by a choice: it does not depend on who reads it.
    classes: the names of the labels, where the layout has names.
    """

    uri: str
    layout: Layout
    fragments: pa.Table
    has_labels: bool
    classes: tuple[str, ...] = ()

    @property
    def rows(self) -> Int[np.ndarray, " fragments"]:
        return self.fragments["rows"].to_numpy()

    @property
    def first_sample(self) -> Int[np.ndarray, " fragments"]:
        return self.fragments["first_sample"].to_numpy()

    @property
    def paths(self) -> list[str]:
        """The files, each once, in the fragments' order."""
        return self.fragments["path"].unique().to_pylist()

    def split(self, share: float, seed: int) -> tuple["Index", "Index"]:
        """The index without, and of, randomly chosen fragments that hold at least `share` of the rows.

        Where fragments are so few that they would hold much more than that, randomly chosen rows of all
        instead. Raises ValueError where one part would be empty.
        """
        rows, key = self.rows, derive_key(seed, _SPLIT)
        wanted = share * rows.sum()
        order = permutation(key, len(rows))
        held = np.cumsum(rows[order])
        count = int(np.searchsorted(held, wanted)) + 1
        if count < len(order) and held[count - 1] <= _ABOUT * wanted:
            return self._part(np.sort(order[count:])), self._part(np.sort(order[:count]))
        order = permutation(key, int(rows.sum()))
        count = math.ceil(wanted)
        if count >= len(order):
            raise ValueError(f"{self.uri} has {len(order)} images, too few to hold out {share:.0%} of them")
        return self.only(np.sort(order[count:])), self.only(np.sort(order[:count]))

    def only(self, rows: Int[np.ndarray, " chosen"]) -> "Index":
        """The index of these rows alone, given by their places in it, ascending."""
        counts = self.rows
        ends = np.cumsum(counts)
        fragment = np.searchsorted(ends, rows, side="right")
        within = rows - (ends - counts)[fragment]
        kept, starts = np.unique(fragment, return_index=True)
        offsets = [*starts.tolist(), len(rows)]
        chosen = [within[start:stop] for start, stop in pairwise(offsets)]
        fragments = self.fragments.take(pa.array(kept))
        if "chosen" in fragments.column_names:
            before = fragments["chosen"].to_pylist()
            chosen = [np.array(rows)[places] for rows, places in zip(before, chosen, strict=True)]
        fragments = fragments.drop_columns(["rows", *({"chosen"} & {*fragments.column_names})])
        fragments = fragments.append_column("rows", pa.array([len(rows) for rows in chosen], pa.int64()))
        return replace(
            self, fragments=fragments.append_column("chosen", pa.array(chosen, pa.list_(pa.int64())))
        )

    def _part(self, fragments: Int[np.ndarray, " some"]) -> "Index":
        return replace(self, fragments=self.fragments.take(pa.array(fragments)))

    def to_bytes(self) -> bytes:
        """The index as a Parquet file, for Index.from_bytes."""
        about = {name: getattr(self, name) for name in ("uri", "layout", "has_labels", "classes")}
        out = io.BytesIO()
        pq.write_table(self.fragments.replace_schema_metadata({"index": json.dumps(about)}), out)
        return out.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Index":
        table = pq.read_table(io.BytesIO(content))
        about = json.loads((table.schema.metadata or {})[b"index"])
        classes = tuple(about.pop("classes"))
        return cls(fragments=_whole(table.replace_schema_metadata(None)), classes=classes, **about)


def build_index(
    uri: str, data: DataConfig, progress: Progress | None = None, *, classes: Sequence[str] = ()
) -> Index:
    """Read the metadata of every file at `uri`; calls progress(done, files) after each.

    The layout is told by the files' endings: Parquet, else tars, else image files. With `classes` those
    give the labels of a folder's classes their numbers. Raises ValueError, naming the URI, where it does
    not exist, holds no image, or lacks a column.
    """
    try:
        listing, layout, files = _list(uri, data, progress)
    except OSError as error:
        raise ValueError(storage.first_line(error)) from error
    if classes and listing.classes:
        listing = folders.relabel(listing, classes, uri)
    fragments = listing.fragments.filter(pc.field("rows") > 0)
    if not len(fragments):
        raise ValueError(f"{uri} holds no image: its {files} files have none")
    rows = fragments["rows"].to_numpy()
    fragments = fragments.append_column("first_sample", pa.array(np.cumsum(rows) - rows))
    return Index(uri, layout, _whole(fragments), listing.has_labels, listing.classes)


def _whole(fragments: pa.Table) -> pa.Table:
    """The same, each column in one piece.

    Of several, every look-up of a window's rows would first make one, and pickling writes the memory that
    they share once for each.
    """
    return fragments.combine_chunks()


def _list(uri: str, data: DataConfig, progress: Progress | None) -> tuple[Listing, Layout, int]:
    """The fragments at `uri`, their layout, and in how many files they are."""
    if uri.startswith(torchvision_source.SCHEME):
        return torchvision_source.index_rows(uri), "torchvision", 1
    filesystem, path = storage.resolve(uri)
    layout, root, files = _find(path, uri)
    told = 0

    def done() -> None:
        nonlocal told
        told += 1
        if progress:
            progress(told, len(files))

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        listing = _index_files(layout, filesystem, root, files, data, pool, done)
    return listing, layout, len(files)


def _index_files(
    layout: Layout,
    filesystem: fs.FileSystem,
    root: str,
    files: list[Place],
    data: DataConfig,
    pool: Executor,
    done: Callable[[], None],
) -> Listing:
    if layout == "parquet":
        return parquet.index_files(filesystem, files, data, pool, done)
    if layout == "tar":
        return tars.index_files(filesystem, files, pool, done)
    return folders.index_files(root, files, done)


def _find(path: str, uri: str) -> tuple[Layout, str, list[Place]]:
    """The layout, the folder from which classes are counted, and the files, sorted."""
    folder, pattern = _split_pattern(path)
    found = storage.listing(uri[: uri.index("*")].rpartition("/")[0] if pattern else uri)
    if pattern:
        # Only * is a wildcard.
        literal = pattern.replace("[", "[[]").replace("?", "[?]")
        found = [file for file in found if fnmatchcase(file.path, literal)]
    for layout, endings in _ENDINGS.items():
        files = [Place(file.path, file.size) for file in found if _ends(file.path, endings)]
        if files:
            root = folder if pattern or [file.path for file in files] != [folder] else _parent(folder)
            return layout, root, sorted(files)
    what = f"matches {pattern}" if pattern else "is Parquet, a tar or an image"
    packed = [file.path for file in found if _ends(file.path, (".tar.gz", ".tgz", ".tar.zst"))]
    hint = f"; {packed[0]} is compressed: write it anew, uncompressed" if packed else ""
    raise ValueError(f"{uri} holds no image: no file there {what}{hint}")


def _ends(path: str, endings: tuple[str, ...]) -> bool:
    hidden = PurePosixPath(path).name.startswith((".", "_"))
    return path.lower().endswith(endings) and not hidden


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _split_pattern(path: str) -> tuple[str, str | None]:
    """The folder to list, and the whole pattern where `path` has wildcards."""
    if "*" not in path:
        return path.rstrip("/"), None
    return _parent(path[: path.index("*")]), path
