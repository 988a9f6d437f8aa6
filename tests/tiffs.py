"""TIFFs written by hand: Pillow's writer knows few of the kinds that there are."""

import struct

_LETTERS = {1: "B", 3: "H", 4: "I"}
_STRIPS, _STRIP_SIZES, _TILES, _TILE_SIZES = 273, 279, 324, 325
BYTE, SHORT, LONG = _LETTERS

# A tag's number to its type and values.
Tags = dict[int, tuple[int, list[int]]]


def tiff(tags: Tags, pixels: list[bytes], order: str = "<", *, tiles: bool = False) -> bytes:
    """A file of one picture: its tags, and its strips or tiles; order as struct's."""
    offsets, body = [], b""
    for part in pixels:
        offsets.append(8 + len(body))
        body += part + bytes(len(part) % 2)
    places, sizes = (_TILES, _TILE_SIZES) if tiles else (_STRIPS, _STRIP_SIZES)
    tags = {**tags, places: (LONG, offsets), sizes: (LONG, [len(part) for part in pixels])}
    directory = 8 + len(body)
    entries, beside = struct.pack(order + "H", len(tags)), b""
    for tag, (kind, values) in sorted(tags.items()):
        value = struct.pack(f"{order}{len(values)}{_LETTERS[kind]}", *values)
        if len(value) > 4:
            place = directory + 2 + 12 * len(tags) + 4 + len(beside)
            beside += value + bytes(len(value) % 2)
            value = struct.pack(order + "I", place)
        entries += struct.pack(order + "HHI", tag, kind, len(values)) + value.ljust(4, b"\0")
    head = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, directory)
    return head + body + entries + bytes(4) + beside
