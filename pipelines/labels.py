"""The label of every image of an index, the labels' names, and a class-balanced share of the images."""

from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from jaxtyping import Int

from pipelines import storage
from pipelines.config import DataConfig
from pipelines.formats import parquet, tars, torchvision_source
from pipelines.formats.base import CONNECTIONS
from pipelines.index import Index
from pipelines.philox import derive_key, permutation
from pipelines.shards import class_names

# First part of a key's path; other modules use others.
_LABELS = 7


def labelled_part(
    index: Index,
    data: DataConfig,
    share: float,
    *,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Index:
    """The index reduced to labelled_share of its images. Calls progress(done, fragments) as it reads labels.

    Raises ValueError if no image has a label.
    """
    chosen = labelled_share(read_labels(index, data, progress), share, seed=seed)
    if not len(chosen):
        raise ValueError(
            f"a share of the labels needs labels, but none of the {len(index.samples):,} images of "
            f"{index.uri} has one; set their column with --data.label-column, or leave out the share"
        )
    return index.only(chosen)


def with_labels(index: Index, data: DataConfig, progress: Callable[[int, int], None]) -> Index:
    """The index with each row's label, if it has labels. Does not read them twice."""
    if index.labels is not None or not index.has_labels:
        return index
    return replace(index, labels=read_labels(index, data, progress))


def read_labels(
    index: Index, data: DataConfig, progress: Callable[[int, int], None]
) -> Int[np.ndarray, " rows"]:
    """The label of each row in the index's order, -1 where there is none.

    Reads no image, except in torchvision data sets without a list of targets. Raises ValueError like
    read_pieces.
    """
    if index.labels is not None:
        return index.labels
    if not index.has_labels:
        return np.full(int(index.rows.sum()), -1)
    if index.layout == "folder":
        return index.fragments["label"].to_numpy()
    found = []
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for part in pool.map(lambda span: _labels(index, span, data), spans := _spans(index)):
            found.append(part)
            progress(spans[len(found) - 1].stop, len(index.fragments))
    return _chosen(index, np.concatenate(found))


def _spans(index: Index) -> list[range]:
    """The fragments of each file, which are consecutive."""
    paths = index.fragments["path"].dictionary_encode().combine_chunks()
    first = np.flatnonzero(np.diff(paths.indices.to_numpy(), prepend=-1)).tolist()
    return [range(start, stop) for start, stop in zip(first, [*first[1:], len(paths)], strict=True)]


def _labels(index: Index, span: range, data: DataConfig) -> Int[np.ndarray, " rows"]:
    """The labels of all rows in the fragments of one file."""
    fragments = index.fragments.slice(span.start, len(span))
    if index.layout == "tar":
        return tars.labels(fragments)
    if index.layout == "torchvision":
        return np.concatenate([torchvision_source.read_labels(each) for each in fragments.to_pylist()])
    filesystem, _ = storage.resolve(index.uri)
    return parquet.read_labels(filesystem, fragments.to_pylist(), data)


def _chosen(index: Index, labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " rows"]:
    """Select the labels of the index's rows from those of all rows in its fragments."""
    read = index.rows_read
    shift = np.cumsum(read) - read - index.first_sample
    return labels[index.samples + np.repeat(shift, index.rows)]


def label_names(index: Index) -> tuple[str, ...]:
    """The names of the labels, from the index or from the metadata of the first Parquet shard."""
    if index.layout == "parquet" and not index.classes:
        return class_names(storage.resolve(index.uri)[0], index.paths[0])
    return index.classes


def numbered(index: Index, labels: Int[np.ndarray, " rows"]) -> Index:
    """The index with the distinct `labels` as its label values, unless it has class names."""
    if index.classes:
        return index
    return replace(index, label_values=tuple(np.unique(labels[labels >= 0]).tolist()))


def labelled_share(labels: Int[np.ndarray, " n"], share: float, *, seed: int) -> Int[np.ndarray, " chosen"]:
    """Positions of `share` of the labelled images, ascending: equally many of each class, to within one.

    A class with fewer images gives all of them, and every class gives at least one. So 1 % of ImageNet has 12
    or 13 images of each class, like the published lists (Chen et al. 2020, section 6.1). The choice depends
    on the seed and the images' positions; a larger share contains every smaller one.
    """
    order = permutation(derive_key(seed, _LABELS), len(labels))
    known = order[labels[order] >= 0]
    # Class by class, each in random order.
    known = known[np.argsort(labels[known], kind="stable")]
    classes, counts = np.unique(labels[known], return_counts=True)
    first = permutation(derive_key(seed, _LABELS, 1), len(classes))
    wanted = _balanced(counts, round(share * len(known)), first)
    place = np.arange(len(known)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(known[place < np.repeat(wanted, counts)])


def _balanced(
    counts: Int[np.ndarray, " classes"], total: int, first: Int[np.ndarray, " classes"]
) -> Int[np.ndarray, " classes"]:
    """How many images to take of each class for `total`, as equal as `counts` allow; `first` get one more."""
    levels = range(1, int(counts.max(initial=0)) + 1)
    level = max(1, bisect_right(levels, total, key=lambda level: np.minimum(counts, level).sum()))
    wanted = np.minimum(counts, level)
    larger = first[counts[first] > level]
    wanted[larger[: max(0, total - int(wanted.sum()))]] += 1
    return wanted
