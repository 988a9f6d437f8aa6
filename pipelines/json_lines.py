"""Files that hold one JSON object a line, each with its checksum."""

from codecs import BOM_UTF8
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines import storage
from pipelines.checksums import ChecksumError, checked_json, json_with_checksum


def encode_lines(objects: Iterable[Mapping[str, Any]]) -> bytes:
    """The objects as lines, each with a key `crc32` of its own."""
    return "".join(json_with_checksum(values) + "\n" for values in objects).encode()


def decode_lines(content: bytes, of: str) -> list[dict[str, Any]]:
    """What encode_lines was given; ValueError, which says `of` what, where a line is damaged.

    What editors add, a byte order mark or lines without text, is passed over.
    """
    objects = []
    for number, line in enumerate(content.removeprefix(BOM_UTF8).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            objects.append(checked_json(line))
        except ChecksumError as error:
            way_out = "restore it, delete that line, or, if you have edited it, its crc32"
            raise ValueError(f"{of} is damaged in line {number}: {error}; {way_out}") from error
        except ValueError as error:
            raise ValueError(f"{of} is damaged in line {number}; restore it, or delete that line") from error
    return objects


def read_lines(uri: str) -> list[dict[str, Any]]:
    """The objects in a file's lines, none where there is no such file; ValueError where one is damaged."""
    return storage.read_as(lambda content: decode_lines(content, uri), uri) or []
