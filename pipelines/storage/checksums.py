"""Checksums (CRC-32) of the files that diptych writes, where other readers of their formats pass over them.

Checkpoints: the zip's comment. Parquet: bytes between pages and footer, which no offset leads to; the pages
have Parquet's own. TOML: a comment as the first line, which a file that is cut keeps. JSON: the last key of
each line. A file without one is taken as it is: it is older, or someone else's. A flipped bit in these marks
leaves all else as it was.
"""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Mapping
from io import BytesIO
from typing import Any
from zlib import crc32

from pipelines import storage

# Not UTF-8, so that no text within a file can be taken for it.
_MARK = b"\x00diptych crc32\xff"
_DIGITS = 8
_SEAL_BYTES = len(_MARK) + 2 * _DIGITS

_FIRST_LINE = re.compile(rb"# crc32: ([0-9a-f]{8})\n")
# Of earlier versions.
_LAST_LINE = re.compile(rb"^# crc32: ([0-9a-f]{8})\n?\Z", re.MULTILINE)
_TOML_MARK = b"# crc32: "
_KEY = "crc32"
_TAIL = len(f', "{_KEY}": "{"0" * _DIGITS}"}}')

# How a zip without a comment ends: with the comment's length, of two bytes.
NO_COMMENT = b"\x00\x00"


class ChecksumError(ValueError):
    """A file is not as diptych wrote it: bits have flipped, or somebody has edited it."""

    def __init__(self, message: str = "its checksum is another") -> None:
        super().__init__(message)


def seal_zip(file: BytesIO) -> None:
    """Give a zip that has no comment one that holds its checksum."""
    view = file.getbuffer()
    assert view[-len(NO_COMMENT) :] == NO_COMMENT
    view[-len(NO_COMMENT) :] = _SEAL_BYTES.to_bytes(len(NO_COMMENT), "little")
    _seal(file, view, len(view))


def seal_parquet(file: BytesIO) -> None:
    """Put the checksums of a Parquet file's pages and of its footer, each as a whole, between them."""
    view = file.getbuffer()
    _seal(file, view, len(view) - _footer_bytes(view[-8:].tobytes()))


def parquet_end_bytes(end: bytes) -> int:
    """How much of a Parquet file's end has its footer and checksum, told by the last eight bytes."""
    return _SEAL_BYTES + _footer_bytes(end)


def check_whole(content: bytes) -> bool:
    """Whether a zip or Parquet file has a checksum; raises ChecksumError where it is not the content's."""
    at, view = content.rfind(_MARK), memoryview(content)
    digits = at + len(_MARK)
    if at >= 0 and view[digits:][: 2 * _DIGITS] != _hex(view[:at]) + _hex(view[at + _SEAL_BYTES :]):
        raise ChecksumError
    return at >= 0


def check_footer(end: bytes) -> None:
    """Raise ChecksumError where the checksum in a Parquet file's `end`, as long as parquet_end_bytes says, is
    not its footer's.
    """
    _, mark, rest = end.rpartition(_MARK)
    if mark and rest[_DIGITS : 2 * _DIGITS] != _hex(rest[2 * _DIGITS :]):
        raise ChecksumError


def toml_with_checksum(text: str) -> bytes:
    """The same below a line that holds its checksum."""
    return _TOML_MARK + _hex(text.encode()) + b"\n" + text.encode()


def checked_toml(content: bytes) -> str:
    """The text of a TOML file, below the line with its checksum.

    Raises ChecksumError where that is another's, ValueError where the text is not UTF-8.
    """
    content = content.removeprefix(BOM_UTF8)
    if content.startswith(_TOML_MARK):
        found = _FIRST_LINE.match(content)
        text = content[found.end() :] if found else b""
        if not found or found[1] != _hex(text):
            raise ChecksumError
        return text.decode()
    found = _LAST_LINE.search(content)
    if found and found[1] != _hex(content[: found.start()]):
        raise ChecksumError
    return content.decode()


def json_with_checksum(values: Mapping[str, Any]) -> str:
    """An object, which has keys but no `crc32`, as a line of JSON with its checksum as that key."""
    assert values
    line = json.dumps(values)
    return f'{line[:-1]}, "{_KEY}": "{_hex(line.encode()).decode()}"}}'


def checked_json(line: bytes) -> dict[str, Any]:
    """The object that a line holds, without its checksum.

    Raises ChecksumError where that is another's, ValueError where the line is no object.
    """
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    checksum = _hex(line[:-_TAIL] + b"}").decode()
    if values and next(reversed(values.values())) == checksum:
        values.popitem()  # Under whatever key: a bit may have flipped in its name.
    if _KEY in values:
        raise ChecksumError
    return values


def _footer_bytes(end: bytes) -> int:
    """With its length and the file's last four bytes."""
    return int.from_bytes(end[-8:-4], "little") + 8


def _seal(file: BytesIO, view: memoryview, at: int) -> None:
    """Insert the checksums of what stands before and behind `at`, without a copy of all of it."""
    end = view[at:].tobytes()
    seal = _MARK + _hex(view[:at]) + _hex(end)
    view.release()  # Else the file could not grow.
    file.seek(at)
    file.write(seal + end)


def _hex(content: bytes | memoryview) -> bytes:
    return b"%08x" % crc32(content)


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
