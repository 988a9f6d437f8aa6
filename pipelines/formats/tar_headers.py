"""The members of a tar, from its headers alone; where it is damaged or cut, that is an error.

Python's tarfile takes a damaged header in the middle for the end of the tar, and does without an end marker.
"""

import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)

# Read at once of what follows the end marker.
_CHUNK = 1 << 16

_AGAIN = "write it anew, uncompressed"
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
# Their headers may name a size, and no content follows.
_EMPTY = (
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
)  # fmt: skip


# Types of headers whose other fields mean the same in every format, and what may end a number.
_ALIKE = (tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)
_ENDS = b"\0 "


class _Header(NamedTuple):
    """The fields of a header block that matter here."""

    name: str
    type: bytes
    size: int


class Member(NamedTuple):
    """A file, folder or link in a tar: where its content lies, and its type as its header has it."""

    name: str
    type: bytes
    offset: int
    size: int


def members(file: BinaryIO, size: int) -> Iterator[Member]:
    """The members of the tar in `file`, which is `size` bytes long, in their order.

    Reads ustar, GNU's and pax' headers. Raises tarfile.ReadError, with the way out, for a header whose
    checksum is wrong, for a tar that is cut or has no end marker, and for sparse files.
    """
    at, before = 0, ""
    common: dict[str, str] = {}
    own: dict[str, str] = {}
    while (block := _read(file, at, _BLOCK, size, before)) != _ZEROS:
        info, data = _header(block, before), at + _BLOCK
        if info.type in (*_PAX, *_LONG, tarfile.XGLTYPE):
            said = _said(info.type, _read(file, data, info.size, size, before), before)
            if info.type == tarfile.XGLTYPE:
                common |= said
            else:
                own |= said
            at = data + _padded(info.size)
            continue
        if info.type == tarfile.REGTYPE and not (own or common):
            member = Member(info.name.rstrip("/"), info.type, data, info.size)
        else:
            member = _member(info, data, common | own)
        at = data + _padded(member.size)
        if at > size:
            raise tarfile.ReadError(f"it breaks off in {member.name}; {_AGAIN}")
        yield member
        before, own = member.name, {}
    if own:
        raise tarfile.ReadError(f"it breaks off after {before or 'its first header'}; {_AGAIN}")
    _check_end(file, at, size, before)


def _said(kind: bytes, content: bytes, before: str) -> dict[str, str]:
    """Fields of the next member, out of the content of a header of that type."""
    if kind not in _LONG:
        return _records(content, before)
    return {"path": _text(content.partition(b"\0")[0])} if kind == tarfile.GNUTYPE_LONGNAME else {}


def _member(info: _Header, data: int, about: dict[str, str]) -> Member:
    """The member of a header, of which the headers before it say `about`."""
    # Slashes at the end, which tarfile takes away too, mark a folder.
    name = about.get("path", info.name).rstrip("/")
    if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in about):
        name = about.get("GNU.sparse.name", name)
        raise tarfile.ReadError(f"{name} is a sparse file; write it anew, without tar's --sparse")
    size = about.get("size", str(info.size))
    if not size.isdecimal():
        raise tarfile.ReadError(f"the size of {name} is {size}; {_AGAIN}")
    return Member(name, info.type, data, 0 if info.type in _EMPTY else int(size))


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _read(file: BinaryIO, at: int, count: int, size: int, before: str) -> bytes:
    """`count` bytes from `at`, which lie within the tar or it is cut."""
    if at == size and count == _BLOCK:
        fault = f"it has no end marker after {before}" if before else "it is empty"
        raise tarfile.ReadError(f"{fault}: it is cut, or was never finished; {_AGAIN}")
    file.seek(at)
    content = file.read(count) if 0 <= count <= size - at else b""
    if len(content) < count or count < 0:
        raise tarfile.ReadError(f"it breaks off after {before or 'its beginning'}; {_AGAIN}")
    return content


def _header(block: bytes, before: str) -> _Header:
    """The fields of a header block, whose checksum is compared with its bytes."""
    if header := _plain_header(block):
        return header
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError as error:
        fault = f"the header after {before} is damaged" if before else "it does not begin as a tar does"
        raise tarfile.ReadError(f"{fault}; {_AGAIN}") from error
    return _Header(info.name, info.type, info.size)


def _plain_header(block: bytes) -> _Header | None:
    """The fields of a header as nearly all are; None where tarfile, which takes ten times as long, must look.

    Its checksum is right: of 256 bytes the lower half of Adler-32 is their sum and one.
    """
    kind, size, checksum = block[156:157], block[124:135], block[148:154]
    if kind not in _ALIKE or block[135] not in _ENDS or block[154] not in _ENDS:
        return None
    total = (zlib.adler32(block[:256]) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2
    try:
        # The checksum's own bytes count as spaces.
        if int(checksum, 8) != total - sum(block[148:156]) + 8 * ord(" "):
            return None
        number = int(size, 8)
    except ValueError:
        return None
    if not (size.isdigit() and checksum.isdigit()):
        return None
    name, prefix = block[:100].partition(b"\0")[0], block[345:500].partition(b"\0")[0]
    return _Header(_text(prefix + b"/" + name if prefix else name), kind, number)


def _text(content: bytes) -> str:
    # Names need not be UTF-8, and Arrow's strings must.
    return content.decode("utf-8", "backslashreplace")


def _records(content: bytes, before: str) -> dict[str, str]:
    """Fields of a pax header: records of the form "LENGTH KEY=VALUE\\n"."""
    found: dict[str, str] = {}
    while content.strip(b"\0"):
        digits, _, rest = content.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = rest[: length - len(digits) - 1].partition(b"=")
        if length > len(content) or not equals or not value.endswith(b"\n"):
            raise tarfile.ReadError(f"the header after {before or 'its beginning'} is damaged; {_AGAIN}")
        found[_text(key)] = _text(value[:-1])
        content = content[length:]
    return found


def _check_end(file: BinaryIO, at: int, size: int, before: str) -> None:
    """Raise ReadError unless zeros alone follow the zero block at `at`.

    Two zero blocks end a tar. One at the very end will do, as it does for GNU tar: all members are there.
    But what follows the marker would be left out unsaid: a second tar, or members behind a hole.
    """
    file.seek(at)
    while at < size and (chunk := file.read(min(_CHUNK, size - at))):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(
                f"more than its end follows {before or 'its beginning'}: two tars in one, or a hole; {_AGAIN}"
            )
        at += len(chunk)
