"""Single flipped bits: each must be noticed, or change nothing that is loaded."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T")


def flips(content: bytes, bits: Iterable[int]) -> Iterator[bytes]:
    """The content with one of the `bits` flipped, which are counted from its start."""
    for bit in bits:
        harmed = bytearray(content)
        harmed[bit // 8] ^= 1 << bit % 8
        yield bytes(harmed)


def noticed(
    read: Callable[[bytes], _T], content: bytes, *, same: Callable[[_T, _T], bool], every: int = 1
) -> float:
    """The share of flipped bits, of each `every`-th, that `read` refuses.

    Fails where another gives something else than `content` does. An odd `every` takes all places in a byte.
    """
    whole, refused, bits = read(content), 0, range(0, len(content) * 8, every)
    for bit, harmed in zip(bits, flips(content, bits), strict=True):
        try:
            found = read(harmed)
        except (ValueError, OSError):
            refused += 1
        else:
            assert same(found, whole), f"bit {bit % 8} of byte {bit // 8}"
    return refused / len(bits)
