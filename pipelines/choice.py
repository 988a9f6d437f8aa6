"""Choose the rows to hold out or to sample, by a hash of seed and row, from each class in proportion.

A row is identified by its sample number, its position in the data set, so the choice does not depend on how
rows are grouped into fragments or on who reads them.
"""

import numpy as np
from jaxtyping import Float, Int

from pipelines.philox import Key, derive_key, hashes, uniforms

# First part of a key's path, then its second and third parts; other modules use other first parts.
_CHOICE = 4
_HELD_OUT, _SAMPLE = 1, 2
_OFFSETS = 1

Places = Int[np.ndarray, " chosen"]


def held_out_places(
    samples: Int[np.ndarray, " rows"], labels: Int[np.ndarray, " rows"] | None, share: float, seed: int
) -> Places:
    """Positions of the rows to hold out, ascending: `share` of each class, to within a row or two.

    Holds out at least one row, and never the last one of a class. Without labels all rows are one class.
    Raises ValueError if there are too few rows.
    """
    classes = _classes(samples, labels)
    priority, place, size = _priorities(samples, classes, seed, _HELD_OUT)
    priority[place == size - 1] = np.inf
    count, most = max(1, round(share * len(samples))), int(np.isfinite(priority).sum())
    if count > most:
        raise ValueError(f"cannot hold out {share:.0%} of {len(samples)} rows and keep one of each class")
    return _first(priority, count, samples, derive_key(seed, _CHOICE, _HELD_OUT))


def sampled_places(
    samples: Int[np.ndarray, " rows"], labels: Int[np.ndarray, " rows"] | None, count: int, seed: int
) -> Places:
    """Positions of `count` rows (or all), ascending: each class in proportion, to within a row or two.

    A larger sample contains every smaller one.
    """
    priority, _, _ = _priorities(samples, _classes(samples, labels), seed, _SAMPLE)
    return _first(priority, min(count, len(samples)), samples, derive_key(seed, _CHOICE, _SAMPLE))


def _classes(samples: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"] | None) -> Int[np.ndarray, " n"]:
    return np.zeros(len(samples), np.int64) if labels is None else np.unique(labels, return_inverse=True)[1]


def _priorities(
    samples: Int[np.ndarray, " n"], classes: Int[np.ndarray, " n"], seed: int, kind: int
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Each row's priority (lowest first), its position in the random order of its class, and the class size.

    Row i of a class of n has priority (i + u) / n, with one u from [0, 1) per class. So however many rows are
    taken, each class gets its share, rounded up or down. Where the share of a class is less than a row, a
    proportional number of such classes gets one row each.
    """
    counts = np.bincount(classes)
    order = np.lexsort((hashes(derive_key(seed, _CHOICE, kind), samples), classes))
    place = np.empty(len(samples), np.int64)
    place[order] = np.arange(len(samples)) - np.repeat(np.cumsum(counts) - counts, counts)
    size = counts[classes]
    offsets = uniforms(derive_key(seed, _CHOICE, kind, _OFFSETS), np.arange(len(counts)), 1)[:, 0]
    return (place + offsets[classes]) / size, place, size


def _first(priority: Float[np.ndarray, " n"], count: int, samples: Int[np.ndarray, " n"], key: Key) -> Places:
    return np.sort(np.lexsort((hashes(key, samples), priority))[:count])


def packed(places: Places) -> bytes:
    """Positions in a fragment as a bit field, lowest bit first: 12.5 kB for a row group of 100,000 rows."""
    bits = np.zeros(int(places[-1]) + 1, bool)
    bits[places] = True
    return np.packbits(bits, bitorder="little").tobytes()


def unpacked(bits: bytes) -> Places:
    """The inverse of packed."""
    return np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little"))
