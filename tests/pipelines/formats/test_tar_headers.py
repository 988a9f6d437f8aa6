"""The members of a tar are those that tarfile and tar write; damage is an error, never fewer members."""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from pipelines.formats.tar_headers import members

_FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
_LONG = f"{'f' * 60}/{'g' * 80}/{'h' * 90}.jpg"


def _tar(names: list[str], format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = 300 * number
            tar.addfile(member, io.BytesIO(bytes([number]) * member.size))
    return out.getvalue()


def _found(content: bytes) -> list[tuple[str, int, int]]:
    return [(m.name, m.offset, m.size) for m in members(io.BytesIO(content), len(content))]


def _found_or_fault(content: bytes) -> list[tuple[str, int, int]] | str:
    try:
        return _found(content)
    except tarfile.ReadError as error:
        return str(error)


def _by_tarfile(content: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [(member.name, member.offset_data, member.size) for member in tar]


@pytest.mark.parametrize("format", _FORMATS)
def test_members_are_tarfiles(format: int) -> None:
    names = ["a.jpg", "folder/b.jpg", "é.jpg", f"{'f' * 90}/{'g' * 90}.jpg", "c.jpg"]
    names += [] if format == tarfile.USTAR_FORMAT else [_LONG, "d.jpg"]
    content = _tar(names, format)
    assert _found(content) == _by_tarfile(content)
    assert [name for name, _, _ in _found(content)] == names


def test_folders_links_and_unknown_kinds_are_stepped_over_as_tarfile_does() -> None:
    out = io.BytesIO()
    kinds = [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, b"Q", tarfile.REGTYPE]
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number, kind in enumerate(kinds):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.type, member.linkname = kind, "0.jpg"
            member.size = 700 if kind in (b"Q", tarfile.REGTYPE) else 0
            tar.addfile(member, io.BytesIO(bytes(member.size)) if member.size else None)
    assert _found(out.getvalue()) == _by_tarfile(out.getvalue())
    assert [m.type for m in members(io.BytesIO(out.getvalue()), len(out.getvalue()))] == kinds


@pytest.mark.skipif(not shutil.which("tar"), reason="no tar")
@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "pax"])
def test_members_are_those_that_tar_packs(format: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(5):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(bytes([number]) * 999 * number)
    command = ["tar", f"--format={format}", "-cf", str(tmp_path / "a.tar"), "-C", str(tmp_path), "in"]
    subprocess.run(command, check=True)
    content = (tmp_path / "a.tar").read_bytes()
    assert _found(content) == _by_tarfile(content)
    assert len(_found(content)) == 6


@pytest.mark.skipif(not shutil.which("tar"), reason="no tar")
@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_a_sparse_file_is_refused_by_name(format: str, tmp_path: Path) -> None:
    with (tmp_path / "holes.jpg").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    command = ["tar", f"--format={format}", "--sparse", "-cf", "a.tar", "holes.jpg"]
    subprocess.run(command, check=True, cwd=tmp_path)
    with pytest.raises(tarfile.ReadError, match=r"holes\.jpg is a sparse file; .* without tar's --sparse"):
        _found((tmp_path / "a.tar").read_bytes())


@pytest.mark.parametrize("format", _FORMATS)
def test_every_bit_of_every_header_is_checked(format: int) -> None:
    name = "b.jpg" if format == tarfile.USTAR_FORMAT else _LONG
    content = _tar(["a.jpg", name, "c.jpg"], format)
    whole = _found(content)
    (before, at, size), (after, next_at, _) = whole[:2]
    begin = at + -(-size // 512) * 512
    blocks = [start for start in range(begin, next_at, 512) if b"ustar" in content[start : start + 512]]
    assert len(blocks) == (1 if format == tarfile.USTAR_FORMAT else 2)
    harmless = set()
    for start in blocks:
        for bit in range(8 * 512):
            damaged = bytearray(content)
            damaged[start + bit // 8] ^= 1 << bit % 8
            if (read := _found_or_fault(bytes(damaged))) == whole:
                harmless.add(bit // 8)
            else:
                assert read == f"the header after {before} is damaged; write it again, uncompressed"
    # Only bits that do not change the number that the checksum's own eight characters stand for.
    assert harmless <= set(range(148, 156))
    assert after == name


@pytest.mark.parametrize("format", _FORMATS)
def test_every_cut_before_the_end_marker_is_an_error(format: int) -> None:
    content = _tar(["a.jpg", "b.jpg", "c.jpg" if format == tarfile.USTAR_FORMAT else _LONG, "d.jpg"], format)
    whole = _found(content)
    _, at, size = whole[-1]
    end = at + -(-size // 512) * 512
    for length in range(end + 512):
        with pytest.raises(tarfile.ReadError, match=r"(no end marker|is truncated|is empty).*; write it"):
            _found(content[:length])
    # GNU's tar takes a single zero block at the very end too: all members are there.
    assert _found(content[: end + 512]) == _found(content[: end + 1024]) == whole


def test_what_follows_the_end_marker_is_not_left_out_unsaid() -> None:
    first, second = _tar(["a.jpg", "b.jpg"]), _tar(["c.jpg"])
    with pytest.raises(
        tarfile.ReadError,
        match=r"data follows its end marker after b\.jpg: two tars in one, or a ho",
    ):
        _found(first + second)
    (_, at, size), *_ = reversed(_found(first))
    holed = first[: at + size + 512 - size % 512] + bytes(1024) + second
    with pytest.raises(tarfile.ReadError, match=r"data follows its end marker after b\.jpg"):
        _found(holed)


@pytest.mark.parametrize("fault", [b"30 path", b"xx path=a\n", b"5 path=a.jpg\n", b"999 path=a.jpg\n"])
def test_a_pax_header_whose_records_do_not_add_up_is_damaged(fault: bytes) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo("pax")
        member.type, member.size = tarfile.XHDTYPE, len(fault)
        tar.addfile(member, io.BytesIO(fault))
    with pytest.raises(tarfile.ReadError, match="is damaged; write it again"):
        _found(out.getvalue())


def test_names_that_are_no_text_are_kept_apart() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        for name in ("é.jpg", "è.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    assert [name for name, _, _ in _found(out.getvalue())] == ["\\xe9.jpg", "\\xe8.jpg"]
