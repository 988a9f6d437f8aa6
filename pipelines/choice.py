"""Which rows are held out or in a sample: by a hash of seed and row, from each class in proportion.

A row is known by its sample's number, its place in the data set's order: how rows are grouped into fragments,
and who reads them, changes nothing.
"""

import numpy as np
from jaxtyping import Float, Int

from pipelines.philox import Key, derive_key, hashes

# First part of a key's path, and what follows it; other modules use others.
_CHOICE = 4
_HELD_OUT, _SAMPLE = 1, 2

Places = Int[np.ndarray, " chosen"]


def held_out_places(
    samples: Int[np.ndarray, " rows"], labels: Int[np.ndarray, " rows"] | None, share: float, seed: int
) -> Places:
    """Places of the rows that are held out, ascending: `share` of each class, to within one row.

    At least one of each class that has two, and never the last of a class. Without labels all rows are one
    class. Raises ValueError where that leaves too few.
    """
    classes = _classes(samples, labels)
    priority, place, size = _priorities(samples, classes, derive_key(seed, _CHOICE, _HELD_OUT))
    priority[place == size - 1] = np.inf
    several = int((np.bincount(classes) > 1).sum())
    count, most = max(round(share * len(samples)), several), int(np.isfinite(priority).sum())
    if count > most or not count:
        raise ValueError(f"cannot hold out {share:.0%} of {len(samples)} rows and keep one of each class")
    return _first(priority, count, samples, derive_key(seed, _CHOICE, _HELD_OUT))


def sampled_places(
    samples: Int[np.ndarray, " rows"], labels: Int[np.ndarray, " rows"] | None, count: int, seed: int
) -> Places:
    """Places of `count` rows, or of all, ascending: of each class in proportion, to within one row.

    At least one of each class where there is room for that. A larger sample has all of a smaller one.
    """
    key = derive_key(seed, _CHOICE, _SAMPLE)
    priority, _, _ = _priorities(samples, _classes(samples, labels), key)
    return _first(priority, min(count, len(samples)), samples, key)


def _classes(samples: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"] | None) -> Int[np.ndarray, " n"]:
    return np.zeros(len(samples), np.int64) if labels is None else np.unique(labels, return_inverse=True)[1]


def _priorities(
    samples: Int[np.ndarray, " n"], classes: Int[np.ndarray, " n"], key: Key
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Each row's priority, less being earlier; its place in the random order of its class; the class's size.

    The i-th of a class of n comes at (i + 1/2) / n: whatever number of rows is taken, each class has its
    share by Sainte-Lague's method. The first of each class comes before all others.
    """
    counts = np.bincount(classes)
    order = np.lexsort((hashes(key, samples), classes))
    place = np.empty(len(samples), np.int64)
    place[order] = np.arange(len(samples)) - np.repeat(np.cumsum(counts) - counts, counts)
    size = counts[classes]
    return np.where(place == 0, 0.0, (place + 0.5) / size), place, size


def _first(priority: Float[np.ndarray, " n"], count: int, samples: Int[np.ndarray, " n"], key: Key) -> Places:
    return np.sort(np.lexsort((hashes(key, samples), priority))[:count])


def packed(places: Places) -> bytes:
    """Places in a fragment as bits, the least first: a row group of 100,000 rows takes 12.5 kB."""
    bits = np.zeros(int(places[-1]) + 1, bool)
    bits[places] = True
    return np.packbits(bits, bitorder="little").tobytes()


def unpacked(bits: bytes) -> Places:
    """What packed was given."""
    return np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little"))
