"""Write encoded images as Parquet shards, and record which command owns a folder of shards."""

import io
import json
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipelines import storage
from pipelines.formats.base import reading
from pipelines.formats.parquet import opened
from pipelines.storage.checksums import checked_json, encode_lines, seal_parquet

_SCHEMA = pa.schema({"image": pa.binary(), "label": pa.int64(), "key": pa.string()})

# Keys of diptych's entries in the metadata of a shard's schema.
_CLASSES, _QUARANTINE = b"classes", b"quarantine"

EncodedImage = tuple[bytes, int, str]


def write_shards(
    images: Iterable[EncodedImage], uri: str, *, rows_per_shard: int, rows_per_group: int
) -> int:
    """Write (encoded bytes, label, key) of each image to uri/00000.parquet, ...; return the shard count.

    The bytes are not changed. Each shard is written completely or not at all.
    """
    images = iter(images)
    shards = 0
    while rows := list(islice(images, rows_per_shard)):
        content, label, key = (list(column) for column in zip(*rows, strict=True))
        table = pa.table({"image": content, "label": label, "key": key}, schema=_SCHEMA)
        shard = encode_shard(table, rows_per_group=rows_per_group)
        storage.write(storage.join(uri, shard_name(shards)), shard)
        shards += 1
    return shards


def shard_name(number: int) -> str:
    """The file name of a shard. Names sort like numbers."""
    return f"{number:05}.parquet"


def encode_shard(
    table: pa.Table, *, rows_per_group: int, classes: Sequence[str] = (), quarantine: str = ""
) -> bytes:
    """`table` as a Parquet file, with the label names and the quarantine lines in its metadata."""
    metadata: dict[bytes | str, bytes | str] = {_CLASSES: json.dumps(list(classes))} if classes else {}
    if quarantine:
        metadata[_QUARANTINE] = quarantine
    fields = [
        field.with_type(pa.binary()) if pa.types.is_large_binary(field.type) else field
        for field in table.schema
    ]
    out = io.BytesIO()
    # No statistics for images: the footer would contain the smallest and the largest one.
    ordered = [field.name for field in fields if not pa.types.is_binary(field.type)]
    options: dict[str, Any] = {
        "compression": "none",  # Images are compressed already.
        "write_page_checksum": True,
        "write_statistics": ordered,
    }
    with pq.ParquetWriter(out, pa.schema(fields, metadata or None), **options) as writer:
        for start in range(0, len(table), rows_per_group):
            # One group at a time, because a shard may exceed the 2 GiB limit of binary.
            group = table.slice(start, rows_per_group).combine_chunks()
            writer.write_table(group.cast(pa.schema(fields)).replace_schema_metadata(metadata or None))
    seal_parquet(out)
    return out.getvalue()


def notes(uri: str) -> tuple[int, str]:
    """The number of rows of a shard, and its quarantine lines."""
    metadata = _footer(*storage.resolve(uri))
    return metadata.num_rows, ((metadata.metadata or {}).get(_QUARANTINE) or b"").decode()


def class_names(filesystem: fs.FileSystem, path: str) -> tuple[str, ...]:
    """The label names in a shard's metadata; empty if there are none."""
    return tuple(json.loads((_footer(filesystem, path).metadata or {}).get(_CLASSES, b"[]")))


def _footer(filesystem: fs.FileSystem, path: str) -> pq.FileMetaData:
    def read() -> pq.FileMetaData:
        with opened(filesystem, path) as file:
            return file.metadata

    return reading(read, path)


# Readers of Parquet data sets skip names that begin with _.
_MANIFEST = "_source.json"

Command = Literal["pack", "embed"]


def claim(dest: str, command: Command, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The settings that an earlier run of the same command noted at `dest`, or None if `dest` is empty.

    A value None in `wanted` matches any. Raises ValueError if `dest` belongs to something else.
    """
    try:
        theirs = _noted(storage.join(dest, _MANIFEST))
        others = [] if theirs or not storage.exists(dest) else storage.listing(dest)
    except OSError as error:
        raise ValueError(f"cannot write {dest}: {storage.first_line(error)}; choose another DEST") from error
    if others:
        raise ValueError(f"{dest} is not empty: it holds {others[0].path}; choose another DEST")
    if theirs is None:
        return None
    if theirs.get("command") != command:
        raise ValueError(f"{dest} was written by `diptych data {theirs.get('command')}`; choose another DEST")
    differing = [
        f"{name} ({theirs.get(name)} there, {value} here)"
        for name, value in wanted.items()
        if value is not None and theirs.get(name) != value
    ]
    if differing:
        raise ValueError(f"{dest} holds shards with another {', '.join(differing)}; choose another DEST")
    return theirs


def _noted(uri: str) -> dict[str, Any] | None:
    """The settings that `note` wrote, on one line, or, from an earlier version, on several."""

    def parsed(content: bytes) -> dict[str, Any]:
        try:
            return checked_json(content.rstrip())
        except ValueError as error:
            raise ValueError(f"{uri} is damaged: {error}; restore it, or choose another DEST") from error

    return storage.read_as(parsed, uri)


def note(dest: str, command: Command, settled: dict[str, Any]) -> None:
    """Record at `dest` which command writes there with which settings. Raises ValueError if it cannot."""
    content = encode_lines([{"command": command, **settled}])
    try:
        storage.write(storage.join(dest, _MANIFEST), content)
    except OSError as error:
        raise ValueError(f"cannot write {dest}: {storage.first_line(error)}; choose another DEST") from error
