"""WebDataset tars: a fragment is a run of samples that lie side by side, known from the tar's headers alone.

Members that follow each other and share their name up to its first dot are one sample: an image, and its
class as a whole number in a member that ends in .cls. Aizman et al. 2019, section 3.
"""

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from itertools import groupby
from typing import Any, cast

import pyarrow as pa
from pyarrow import fs

from pipelines.layout import CHANGED, IMAGE_ENDINGS, ROWS, Listing, Place, reading

ENDINGS = (".tar",)

# What is read at once: large enough for object storage, small enough to shuffle.
_FRAGMENT_BYTES = 4 << 20
_FRAGMENT_SAMPLES = 256

# Headers lie between members; small members come along with them.
_BUFFER = 1 << 16

_SAMPLE = pa.struct(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("label_offset", pa.int64()),
        ("label_size", pa.int64()),
    ]
)
_FRAGMENTS = pa.schema({"path": pa.string(), "rows": pa.int64(), "samples": pa.list_(_SAMPLE)})


def index_files(
    filesystem: fs.FileSystem, files: list[Place], pool: Executor, done: Callable[[], None]
) -> Listing:
    """The samples of `files`, which have labels if all have a .cls member.

    Raises ValueError for a tar that cannot be read.
    """

    def fragments(file: Place) -> list[dict[str, Any]]:
        found = reading(lambda: list(_fragments(filesystem, file.path)), file.path)
        done()
        return found

    rows = [fragment for found in pool.map(fragments, files) for fragment in found]
    has_labels = all(sample["label_size"] for fragment in rows for sample in fragment["samples"])
    return Listing(pa.Table.from_pylist(rows, schema=_FRAGMENTS), has_labels)


def _fragments(filesystem: fs.FileSystem, path: str) -> Iterator[dict[str, Any]]:
    run: list[dict[str, Any]] = []
    for sample in _samples(filesystem, path):
        if run and (
            len(run) == _FRAGMENT_SAMPLES
            or sample["offset"] + sample["size"] - run[0]["offset"] > _FRAGMENT_BYTES
        ):
            yield {"path": path, "rows": len(run), "samples": run}
            run = []
        run.append(sample)
    if run:
        yield {"path": path, "rows": len(run), "samples": run}


def _samples(filesystem: fs.FileSystem, path: str) -> Iterator[dict[str, Any]]:
    try:
        with filesystem.open_input_file(path) as file:
            buffered = io.BufferedReader(cast(io.RawIOBase, file), _BUFFER)
            with tarfile.open(fileobj=buffered, mode="r:") as tar:
                for key, members in groupby((m for m in tar if m.isfile()), lambda m: _split(m.name)[0]):
                    if sample := _sample(key, members):
                        yield sample
    except tarfile.TarError as error:
        raise ValueError(f"cannot read {path}: {error}; write it anew, uncompressed") from error


def _sample(key: str, members: Iterable[tarfile.TarInfo]) -> dict[str, Any] | None:
    """Where the image and its class lie, or None where there is no image."""
    sample: dict[str, Any] = {"key": key, "label_offset": 0, "label_size": 0}
    for member in members:
        ending = _split(member.name)[1].lower()
        if ending == ".cls":
            sample |= {"label_offset": member.offset_data, "label_size": member.size}
        elif ending.endswith(IMAGE_ENDINGS):
            sample |= {"offset": member.offset_data, "size": member.size}
    return sample if "offset" in sample else None


def _split(name: str) -> tuple[str, str]:
    """A member's key and ending: the name up to the first dot of its last part, and the rest."""
    folder, _, last = name.rpartition("/")
    stem, dot, ending = last.partition(".")
    return (f"{folder}/{stem}" if folder else stem), dot + ending


def read_pieces(filesystem: fs.FileSystem, pieces: list[dict], has_labels: bool, pool: Executor) -> pa.Table:
    """Samples [start, stop) of each fragment, as layout.ROWS; one read a piece."""
    return pa.concat_tables(pool.map(lambda piece: _read_piece(filesystem, piece, has_labels), pieces))


def _read_piece(filesystem: fs.FileSystem, piece: dict, has_labels: bool) -> pa.Table:
    path, samples = piece["path"], piece["samples"][piece["start"] : piece["stop"]]
    parts = [(s["offset"], s["size"]) for s in samples]
    parts += [(s["label_offset"], s["label_size"]) for s in samples if has_labels]
    first, last = min(offset for offset, _ in parts), max(offset + size for offset, size in parts)

    def read() -> bytes:
        with filesystem.open_input_file(path) as file:
            return file.read_at(last - first, first)

    content = memoryview(reading(read, path))

    if len(content) < last - first:
        raise ValueError(f"cannot read {path}: it is shorter than when it was indexed; {CHANGED}")

    def part(offset: int, size: int) -> bytes:
        return bytes(content[offset - first : offset - first + size])

    labels = (
        [_label(part(s["label_offset"], s["label_size"]), path, s) for s in samples] if has_labels else []
    )
    columns = {
        "image": [part(s["offset"], s["size"]) for s in samples],
        "label": labels or [-1] * len(samples),
        "path": [path] * len(samples),
        "key": [s["key"] for s in samples],
    }
    return pa.table(columns, schema=ROWS)


def _label(content: bytes, path: str, sample: dict[str, Any]) -> int:
    try:
        return int(content)
    except ValueError as error:
        raise ValueError(
            f"{path}: {sample['key']}.cls is {content[:20]!r}, not a whole number from 0"
        ) from error
