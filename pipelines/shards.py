"""Encoded images to Parquet shards in object storage."""

import io
from collections.abc import Iterable
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage

_SCHEMA = pa.schema({"image": pa.binary(), "label": pa.int64(), "key": pa.string()})

EncodedImage = tuple[bytes, int, str]


def write_shards(
    images: Iterable[EncodedImage], uri: str, *, rows_per_shard: int, rows_per_group: int
) -> int:
    """Write (encoded bytes, label, key) of each image to uri/00000.parquet and on; the number of shards.

    The bytes are kept as they are. Each shard is written whole or not at all.
    """
    images = iter(images)
    shards = 0
    while rows := list(islice(images, rows_per_shard)):
        content, label, key = (list(column) for column in zip(*rows, strict=True))
        table = pa.table({"image": content, "label": label, "key": key}, schema=_SCHEMA)
        out = io.BytesIO()
        # Images are compressed already.
        pq.write_table(table, out, row_group_size=rows_per_group, compression="none")
        storage.write(storage.join(uri, f"{shards:05}.parquet"), out.getvalue())
        shards += 1
    return shards
