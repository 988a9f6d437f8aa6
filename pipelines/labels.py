"""The label of every image of an index, the labels' names, and a share of each class's images."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from jaxtyping import Int

from pipelines import parquet, storage, torchvision_source
from pipelines.choice import unpacked
from pipelines.config import DataConfig
from pipelines.layout import CONNECTIONS
from pipelines.philox import derive_key, permutation
from pipelines.shards import class_names
from pipelines.sources import Index

# First part of a key's path; other modules use others.
_LABELS = 7


def labelled_part(
    index: Index, data: DataConfig, share: float, *, seed: int, progress: Callable[[int, int], None]
) -> Index:
    """The index of `share` of each class's images; calls progress(done, fragments) as it reads the labels."""
    return index.only(labelled_share(read_labels(index, data, progress), share, seed=seed))


def with_labels(index: Index, data: DataConfig, progress: Callable[[int, int], None]) -> Index:
    """The index with each row's label, where images have labels: those known are not read again."""
    if index.labels is not None or not index.has_labels:
        return index
    return replace(index, labels=read_labels(index, data, progress))


def read_labels(
    index: Index, data: DataConfig, progress: Callable[[int, int], None]
) -> Int[np.ndarray, " rows"]:
    """The label of each row, -1 where it has none, in the index's order.

    No image is read, but of torchvision's data sets that have no list of their targets. Raises ValueError as
    read_pieces does.
    """
    if index.labels is not None:
        return index.labels
    if not index.has_labels:
        return np.full(int(index.rows.sum()), -1)
    if index.layout == "folder":
        return index.fragments["label"].to_numpy()
    filesystem, _ = storage.resolve(index.uri)

    def labels(number: int) -> Int[np.ndarray, " rows"]:
        fragment = index.fragments.slice(number, 1).to_pylist()[0]
        if index.layout == "tar":
            found = np.array([sample["label"] for sample in fragment["samples"]])
        elif index.layout == "torchvision":
            found = torchvision_source.read_labels(fragment)
        else:
            found = parquet.read_labels(filesystem, fragment, data)
        return found[unpacked(fragment["chosen"])] if fragment.get("chosen") else found

    found = []
    count = len(index.fragments)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for number, part in enumerate(pool.map(labels, range(count))):
            found.append(part)
            progress(number + 1, count)
    return np.concatenate(found)


def label_names(index: Index) -> tuple[str, ...]:
    """The names of the labels, as the layout has them or as the first Parquet shard keeps them."""
    if index.layout == "parquet" and not index.classes:
        return class_names(storage.resolve(index.uri)[0], index.paths[0])
    return index.classes


def numbered(index: Index, labels: Int[np.ndarray, " rows"]) -> Index:
    """The index whose classes are `labels`, each once, where no names of classes say what they are."""
    if index.classes:
        return index
    return replace(index, label_values=tuple(np.unique(labels[labels >= 0]).tolist()))


def labelled_share(labels: Int[np.ndarray, " n"], share: float, *, seed: int) -> Int[np.ndarray, " chosen"]:
    """Places of `share` of the labelled images of each class, at least one of each, ascending.

    Chen et al. 2020, section 6.1: 1 % and 10 % of ImageNet, class by class. A larger share has all of a
    smaller one.
    """
    order = permutation(derive_key(seed, _LABELS), len(labels))
    shuffled = labels[order]
    chosen = [np.empty(0, np.int64)]
    for label in np.unique(shuffled[shuffled >= 0]):
        places = np.flatnonzero(shuffled == label)
        chosen.append(order[places[: max(1, round(share * len(places)))]])
    return np.sort(np.concatenate(chosen))
