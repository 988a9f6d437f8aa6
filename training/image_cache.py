"""Encoded images that evaluation reads again and again: from storage once, then from memory."""

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import pyarrow as pa

# Of a process on its own: CIFAR-10 has 150 MB, a bank of 20,000 photographs about as much as this.
_MOST_BYTES = 2 << 30


class ImageCache:
    """Tables by a key, where `put` lays them and from where `get` brings them back.

    Unset, they stay in this process, up to `most_bytes` together. A set of images of which `put` gives None
    for a table, or that has no room, is read anew each time.
    """

    def __init__(
        self,
        put: Callable[[pa.Table], Any] = lambda table: table,
        get: Callable[[Any], pa.Table] = lambda table: table,
        most_bytes: int | None = _MOST_BYTES,
    ) -> None:
        self._put, self._get, self._most_bytes = put, get, most_bytes
        self._kept: dict[Hashable, list[Any]] = {}
        self._bytes = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def tables(self, key: Hashable, read: Callable[[], Iterator[pa.Table]]) -> Iterator[pa.Table]:
        """What `read` gives: called the first time, and as long as it has not been read to its end."""
        if key in self._kept:
            yield from self.kept(key)
            return
        kept: list[Any] | None = []
        size = 0
        for table in read():
            size += table.nbytes
            if self._most_bytes is not None and self._bytes + size > self._most_bytes:
                kept = None
            laid = None if kept is None else self._put(table)
            kept = None if kept is None or laid is None else [*kept, laid]
            yield table
        if kept is not None:
            self._kept[key] = kept
            self._bytes += size

    def kept(self, key: Hashable) -> Iterator[pa.Table]:
        """The tables of a key that is there."""
        return map(self._get, self._kept[key])

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
        self._bytes = 0
