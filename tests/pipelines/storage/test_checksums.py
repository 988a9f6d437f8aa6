"""Every bit of diptych's files is checked when read; other readers ignore the checksum."""

import io
import json
import tomllib
from codecs import BOM_UTF8
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import tomli_w
from flips import noticed
from pyarrow import fs

from pipelines.config import DataConfig
from pipelines.formats.base import reading
from pipelines.formats.parquet import opened
from pipelines.index import Index, build_index
from pipelines.shards import encode_shard
from pipelines.storage.checksums import (
    ChecksumError,
    check_whole,
    checked_json,
    checked_toml,
    decode_lines,
    encode_lines,
    json_with_checksum,
    seal_parquet,
    toml_with_checksum,
)

_LINE = {"step": 3, "loss": 0.1 + 0.2, "reason": 'an "ü"\n', "of": [{"images": None}]}
_TOML = {"name": "a", "data": {"train": "s3://bücket/a", "size": 3}, "steps": 10}

# CRC-32's check value, as in RFC 1952's own implementation: of "123456789".
_CHECKED, _CHECK = b"123456789", b"cbf43926"


def _shard() -> bytes:
    images = [bytes(range(40)), b"\xff" * 30, b"short"]
    table = pa.table({"image": images, "label": [3, 1, 2], "key": ["a", "b", "../c"]})
    return encode_shard(table, rows_per_group=2, classes=["one", "two"], quarantine="why")


def _read_shard(content: bytes, folder: Path) -> tuple[list[pa.Table], dict]:
    (folder / "shard").write_bytes(content)
    with opened(fs.LocalFileSystem(), str(folder / "shard")) as file:
        return [file.read_row_group(n) for n in range(file.num_row_groups)], file.metadata.metadata


def test_every_bit_of_a_line_of_json_is_checked() -> None:
    line = json_with_checksum(_LINE).encode()
    assert checked_json(line) == _LINE
    assert noticed(checked_json, line, same=lambda found, whole: found == whole) > 0.8


def test_every_bit_of_a_toml_file_is_checked() -> None:
    content = toml_with_checksum(tomli_w.dumps(_TOML))
    assert (
        noticed(
            lambda content: tomllib.loads(checked_toml(content)),
            content,
            same=lambda found, whole: found == whole,
        )
        > 0.8
    )


def test_a_toml_file_that_is_cut_anywhere_is_noticed_or_empty() -> None:
    content = toml_with_checksum(tomli_w.dumps(_TOML))
    for end in range(len(content)):
        try:
            assert tomllib.loads(checked_toml(content[:end])) == {}
        except ChecksumError:
            assert end >= len("# crc32: ")


def test_the_checksum_of_an_earlier_version_is_the_last_line() -> None:
    text = tomli_w.dumps(_TOML)
    content = text.encode() + b"# crc32: %08x\n" % crc32(text.encode())
    assert tomllib.loads(checked_toml(content)) == _TOML
    with pytest.raises(ChecksumError):
        checked_toml(content.replace(b"10", b"20"))


def test_what_editors_add_is_passed_over() -> None:
    content = toml_with_checksum(tomli_w.dumps(_TOML))
    assert tomllib.loads(checked_toml(BOM_UTF8 + content)) == _TOML
    lines = encode_lines([_LINE, _LINE])
    for edited in (lines + b"\n", lines + b" \n\n", BOM_UTF8 + lines, lines.replace(b"\n", b"\r\n")):
        assert decode_lines(edited, "the file") == [_LINE, _LINE]
    with pytest.raises(ValueError, match="the file is damaged in line 4; restore it"):
        decode_lines(lines + b"\n{\n", "the file")


def test_every_bit_of_a_shard_is_checked(tmp_path: Path) -> None:
    def same(found: tuple[list[pa.Table], dict], whole: tuple[list[pa.Table], dict]) -> bool:
        tables = zip(found[0], whole[0], strict=True)
        return found[1] == whole[1] and all(a.equals(b, check_metadata=True) for a, b in tables)

    assert noticed(lambda content: _read_shard(content, tmp_path), _shard(), same=same, every=5) > 0.8


def test_every_bit_of_an_index_is_checked(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"a", b"b"], "label": [1, 2]}), tmp_path / "0.parquet")
    index = build_index(str(tmp_path), DataConfig(train=str(tmp_path)))

    def same(found: Index, whole: Index) -> bool:
        return found.fragments.equals(whole.fragments) and found.label_values == whole.label_values

    assert noticed(Index.from_bytes, index.to_bytes(), same=same) > 0.95


def test_the_checksum_is_crc_32() -> None:
    assert toml_with_checksum(_CHECKED.decode()) == b"# crc32: " + _CHECK + b"\n" + _CHECKED


def test_other_readers_pass_over_it(tmp_path: Path) -> None:
    assert tomllib.loads(toml_with_checksum(tomli_w.dumps(_TOML)).decode()) == _TOML
    lines = "".join(json_with_checksum({**_LINE, "step": step}) + "\n" for step in (1, 2))
    found = pd.read_json(io.StringIO(lines), lines=True)
    assert list(found.columns) == [*_LINE, "crc32"]
    assert found["step"].tolist() == [1, 2]
    assert json.loads(lines.splitlines()[0])["reason"] == _LINE["reason"]
    table = pq.read_table(io.BytesIO(_shard()))
    assert table["label"].to_pylist() == [3, 1, 2]
    assert ds.dataset(_written(tmp_path / "shard.parquet", _shard())).to_table().equals(table)


def _written(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def test_what_has_no_checksum_is_read_as_it_is(tmp_path: Path) -> None:
    assert checked_json(json.dumps(_LINE).encode()) == _LINE
    assert tomllib.loads(checked_toml(tomli_w.dumps(_TOML).encode())) == _TOML
    pq.write_table(pa.table({"a": [1]}), tmp_path / "shard")
    content = (tmp_path / "shard").read_bytes()
    assert not check_whole(content)
    assert _read_shard(content, tmp_path)[0][0]["a"].to_pylist() == [1]


def test_an_edited_file_is_refused_until_its_checksum_is_taken_away() -> None:
    edited = toml_with_checksum("steps = 10\n").replace(b"10", b"20")
    with pytest.raises(ChecksumError):
        checked_toml(edited)
    assert checked_toml(edited.partition(b"\n")[2]) == "steps = 20\n"
    line = json_with_checksum({"steps": 10}).replace("10", "20")
    with pytest.raises(ChecksumError):
        checked_json(line.encode())
    assert checked_json(line.partition(", ")[0].encode() + b"}") == {"steps": 20}


def test_a_footer_longer_than_what_is_read_first_is_checked(tmp_path: Path) -> None:
    columns = {f"column {number}": [number] for number in range(800)}
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, write_page_checksum=True)
    seal_parquet(out)
    content = out.getvalue()
    assert int.from_bytes(content[-8:-4], "little") > 100_000
    assert _read_shard(content, tmp_path)[0][0]["column 7"].to_pylist() == [7]
    harmed = bytearray(content)
    harmed[-90_000] ^= 1
    with pytest.raises(ChecksumError):
        _read_shard(bytes(harmed), tmp_path)


def test_a_damaged_page_is_told_with_the_file_and_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    content = bytearray(_shard())
    content[content.index(bytes(range(10, 20)))] ^= 1
    path.write_bytes(content)

    def read() -> pa.Table:
        with opened(fs.LocalFileSystem(), str(path)) as file:
            return file.read()

    with pytest.raises(
        ValueError, match=rf"^cannot read {path}: .*CRC checksum.*; write it again, or remove it"
    ):
        reading(read, str(path))


def test_pages_of_embeddings_are_covered_too(tmp_path: Path) -> None:
    features = np.arange(64, dtype=np.float32)
    table = pa.table({"key": ["a"], "feature": pa.FixedSizeListArray.from_arrays(pa.array(features), 64)})
    content = encode_shard(table, rows_per_group=1)
    at = content.index(np.float32(33).tobytes())
    assert _read_shard(content, tmp_path)[0][0].equals(table)
    harmed = content[:at] + b"\x01" + content[at + 1 :]
    with pytest.raises(OSError, match="CRC checksum"):
        _read_shard(harmed, tmp_path)
