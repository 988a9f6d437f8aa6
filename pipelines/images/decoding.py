"""Find the encoded images that do not decode, one by one, in this process or in a separate one."""

import atexit
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int, UInt8

from pipelines.augment.dali_graph import build_decoder
from pipelines.formats.base import Identity
from pipelines.images.conversion import to_png
from pipelines.images.header import read_header
from pipelines.images.isolation import Crash, Isolated
from pipelines.images.pillow import BadImageError


def undecodable(
    images: Iterable[UInt8[np.ndarray, " bytes"]],
    stored_sizes: Int[np.ndarray, "n 2"],
    *,
    gpu: int | None = None,
) -> dict[int, str]:
    """The reason, by position, for each image that does not decode or decodes to another size."""
    reasons = {}
    for position, (image, size) in enumerate(zip(images, stored_sizes.tolist(), strict=True)):
        try:
            (decoded,) = _decoder(gpu).run(image=[image])
        except RuntimeError as error:
            reasons[position] = f"its pixels cannot be decoded ({_first_line(error)})"
            continue
        if list(found := decoded[0].shape()[:2]) != size:
            reasons[position] = f"decodes to {_written(found)} pixels, its header says {_written(size)}"
    return reasons


def faults(
    images: Iterable[bytes], *, converted: bool = False, gpu: int | None = None
) -> Iterator[str | None]:
    """Yield the reason why each image does not decode, or None, decoding as training does.

    Decodes in another process; an image that crashes it does not decode. `converted`: the images that need
    Pillow are PNG already, else they are converted first.
    """
    for fault in _in_another_process().each((image, converted, gpu) for image in images):
        yield str(fault) if isinstance(fault, Crash) else fault


def screened(tables: Iterable[pa.Table], rows: int, *, gpu: int | None = None) -> Iterator[pa.Table]:
    """The tables (reader.SCHEMA), with images that do not decode marked as bad; checks the first `rows`."""
    left = rows
    for table in tables:
        checked, left = table.slice(0, max(0, left)), left - len(table)
        good = np.flatnonzero(checked["bad"].is_null().to_numpy())
        images = (checked["image"][row].as_py() for row in good.tolist())
        found = zip(good.tolist(), faults(images, converted=True, gpu=gpu), strict=True)
        yield _with_bad(table, {row: fault for row, fault in found if fault})


def known_bad(tables: Iterable[pa.Table], known: Mapping[Identity, str]) -> Iterator[pa.Table]:
    """The tables (reader.SCHEMA), with the images in `known` marked as bad, for the given reasons."""
    for table in tables:
        columns = (table[name].to_pylist() for name in ("path", "key", "sample"))
        images = zip(*columns, strict=True) if known else ()
        yield _with_bad(table, {row: known[image] for row, image in enumerate(images) if image in known})


def _with_bad(table: pa.Table, broken: Mapping[int, str]) -> pa.Table:
    if not broken:
        return table
    reasons = table["bad"].to_pylist()
    for row, reason in broken.items():
        reasons[row] = reasons[row] or reason
    at = table.schema.get_field_index("bad")
    return table.set_column(at, table.schema.field(at), pa.array(reasons, pa.string()))


@cache
def _in_another_process() -> Isolated[tuple[bytes, bool, int | None], str | None]:
    process = Isolated(_fault)
    atexit.register(process.close)
    return process


def _fault(item: tuple[bytes, bool, int | None]) -> str | None:
    """The reason why the image does not decode, or None."""
    content, converted, gpu = item
    try:
        header = read_header(content, max_pixels=sys.maxsize)
        if header.for_pillow and not converted:
            content, header = to_png(content, header), header.upright
    except BadImageError as bad:
        return str(bad)
    size = np.array([header.stored_size])
    return undecodable([np.frombuffer(content, np.uint8)], size, gpu=gpu).get(0)


def _written(size: Sequence[int]) -> str:
    """A size (height, width) as text: width x height."""
    return f"{size[1]} x {size[0]}"


@lru_cache(maxsize=1)
def _decoder(gpu: int | None) -> Any:
    """The decoder, built on first use: images are seldom broken."""
    return build_decoder(gpu=gpu)


def _first_line(error: RuntimeError) -> str:
    """The cause in a message of DALI's, without the operator and the stack trace."""
    lines = str(error).rpartition("encountered:")[2].split("\n")
    return next((line.strip(" :") for line in lines if line.strip()), "unknown")
