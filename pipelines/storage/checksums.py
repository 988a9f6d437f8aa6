"""Checksums (CRC-32) in the files that diptych writes, at places that other readers ignore.

Checkpoints: the zip's comment. Parquet: bytes between the pages and the footer that no offset refers to; the
pages have Parquet's own checksums. TOML: a comment in the first line, which survives truncation. JSON: the
last key of each line. A file without a checksum is accepted: it is older, or someone else's. A flipped bit in
the mark itself damages nothing else.
"""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Mapping
from io import BytesIO
from typing import Any
from zlib import crc32

from pipelines import storage

# Not UTF-8, so that no text in a file can be mistaken for it.
_MARK = b"\x00diptych crc32\xff"
_DIGITS = 8
_SEAL_BYTES = len(_MARK) + 2 * _DIGITS

_FIRST_LINE = re.compile(rb"# crc32: ([0-9a-f]{8})\n")
# In files of earlier versions.
_LAST_LINE = re.compile(rb"^# crc32: ([0-9a-f]{8})\n?\Z", re.MULTILINE)
_TOML_MARK = b"# crc32: "
_KEY = "crc32"
_TAIL = len(f', "{_KEY}": "{"0" * _DIGITS}"}}')

# The end of a zip without a comment: the two bytes of the comment's length.
NO_COMMENT = b"\x00\x00"


class ChecksumError(ValueError):
    """A file is not as diptych wrote it: bits have flipped, or someone has edited it."""

    def __init__(self, message: str = "its checksum does not match") -> None:
        super().__init__(message)


def seal_zip(file: BytesIO) -> None:
    """Add the checksum to a zip that has no comment, as its comment."""
    view = file.getbuffer()
    assert view[-len(NO_COMMENT) :] == NO_COMMENT
    view[-len(NO_COMMENT) :] = _SEAL_BYTES.to_bytes(len(NO_COMMENT), "little")
    _seal(file, view, len(view))


def seal_parquet(file: BytesIO) -> None:
    """Insert two checksums between a Parquet file's pages and footer: of all pages, and of the footer."""
    view = file.getbuffer()
    _seal(file, view, len(view) - _footer_bytes(view[-8:].tobytes()))


def parquet_end_bytes(end: bytes) -> int:
    """The number of bytes of a Parquet file's footer and checksums, computed from its last eight bytes."""
    return _SEAL_BYTES + _footer_bytes(end)


def check_whole(content: bytes) -> bool:
    """Whether a zip or Parquet file has a checksum. Raises ChecksumError if it does not match."""
    at, view = content.rfind(_MARK), memoryview(content)
    digits = at + len(_MARK)
    if at >= 0 and view[digits:][: 2 * _DIGITS] != _hex(view[:at]) + _hex(view[at + _SEAL_BYTES :]):
        raise ChecksumError
    return at >= 0


def check_footer(end: bytes) -> None:
    """Raise ChecksumError if the footer's checksum does not match. end: the last parquet_end_bytes bytes."""
    _, mark, rest = end.rpartition(_MARK)
    if mark and rest[_DIGITS : 2 * _DIGITS] != _hex(rest[2 * _DIGITS :]):
        raise ChecksumError


def toml_with_checksum(text: str) -> bytes:
    """The text as UTF-8 after a first line with its checksum."""
    return _TOML_MARK + _hex(text.encode()) + b"\n" + text.encode()


def checked_toml(content: bytes) -> str:
    """The text of a TOML file, without the line with its checksum.

    Raises ChecksumError if that does not match, ValueError if the text is not UTF-8.
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
    """A JSON object on one line, with its checksum added as the key `crc32`. `values` is not empty."""
    assert values
    line = json.dumps(values)
    return f'{line[:-1]}, "{_KEY}": "{_hex(line.encode()).decode()}"}}'


def checked_json(line: bytes) -> dict[str, Any]:
    """The JSON object on a line, without its checksum.

    Raises ChecksumError if that does not match, ValueError if the line is not an object.
    """
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    checksum = _hex(line[:-_TAIL] + b"}").decode()
    if values and next(reversed(values.values())) == checksum:
        values.popitem()  # Whatever its key: a bit may have flipped in its name.
    if _KEY in values:
        raise ChecksumError
    return values


def _footer_bytes(end: bytes) -> int:
    """The size of the footer, including its length field and the file's last four bytes."""
    return int.from_bytes(end[-8:-4], "little") + 8


def _seal(file: BytesIO, view: memoryview, at: int) -> None:
    """Insert the checksums of the bytes before and after `at`, without copying those before it."""
    end = view[at:].tobytes()
    seal = _MARK + _hex(view[:at]) + _hex(end)
    view.release()  # Otherwise the buffer cannot grow.
    file.seek(at)
    file.write(seal + end)


def _hex(content: bytes | memoryview) -> bytes:
    return b"%08x" % crc32(content)


def encode_lines(objects: Iterable[Mapping[str, Any]]) -> bytes:
    """The objects as JSON lines, each with its own key `crc32`."""
    return "".join(json_with_checksum(values) + "\n" for values in objects).encode()


def decode_lines(content: bytes, of: str) -> list[dict[str, Any]]:
    """The inverse of encode_lines. Raises ValueError, which names the source `of`, for a damaged line.

    Ignores a byte order mark and empty lines, which editors add.
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
    """The objects in a file of JSON lines, if it exists. Raises ValueError for a damaged line."""
    return storage.read_as(lambda content: decode_lines(content, uri), uri) or []
