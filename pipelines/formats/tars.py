"""WebDataset tars: a fragment is a run of consecutive samples, found from the tar's headers.

Consecutive members with the same key (the name up to its first dot) are one sample: an image, and optionally
its class as a whole number in a .cls member. Aizman et al. 2019, section 3.
"""

import codecs
import re
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int
from pyarrow import fs

from pipelines.config import DataConfig
from pipelines.formats.base import CHANGED, CONNECTIONS, IMAGE_ENDINGS, JUNK, ROWS, Listing, Place, reading
from pipelines.formats.read_ahead import read_ahead
from pipelines.formats.tar_headers import Member, members

ENDINGS = (".tar",)

# Size of a fragment: large enough for object storage, small enough to shuffle.
_FRAGMENT_BYTES = 4 << 20
_FRAGMENT_SAMPLES = 256

_CLASS = ".cls"
_LARGEST_LABEL = 2**63 - 1
_NUMBER = re.compile(r"[+-]?[0-9]+")

# Bytes to read of a .cls member: more than any label needs.
_LABEL_BYTES = 64

# Members to list in an error.
_SHOWN = 4

_SAMPLE = [
    pa.field("key", pa.string()),
    *(pa.field(name, pa.int64()) for name in ("offset", "size", "label")),
]
_FRAGMENTS = pa.schema({"path": pa.string(), "rows": pa.int64(), "samples": pa.list_(pa.struct(_SAMPLE))})
_NONE = array("q")


class _Part(NamedTuple):
    """A member, as part of the sample with its key.

    ending: the name from the dot that ends the key, in lower case. content: the first bytes of a .cls member.
    """

    key: str
    ending: str
    member: Member
    is_image: bool
    content: bytes = b""

    @property
    def is_plain(self) -> bool:
        """Whether the ending has a single dot."""
        return self.ending.count(".") == 1

    @property
    def stem(self) -> str:
        """The name without its last ending."""
        return self.member.name.rpartition(".")[0]


@dataclass
class _TarSamples:
    """The samples of one tar, in columns: a list of dictionaries would take four times the memory.

    no_label: the first sample without a label, if any. dotted: groups of images that share a key although
    each image is a sample of its own.
    """

    path: str
    keys: list[str] = field(default_factory=list)
    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    labels: "array[int]" = field(default_factory=lambda: array("q"))
    no_label: str | None = None
    dotted: list[list[_Part]] = field(default_factory=list)


def index_files(
    filesystem: fs.FileSystem,
    files: list[Place],
    data: DataConfig,
    pool: Executor,
    done: Callable[[], None],
) -> Listing:
    """List the samples of `files`. They have labels if every sample has a .cls member.

    Raises ValueError for a tar that cannot be read to its end, a duplicate name, a class that is not a
    number, and a sample with several images of which none is chosen.
    """

    ahead = max(2, CONNECTIONS // len(files))

    def samples(file: Place) -> tuple[pa.Table, _TarSamples]:
        found = reading(lambda: _read_tar(filesystem, file.path, data, ahead), file.path)
        done()
        # Without the columns: for all tars they would take several times the memory of the table.
        return _fragments(found), replace(found, keys=[], offsets=_NONE, sizes=_NONE, labels=_NONE)

    found = list(pool.map(samples, files))
    tars = [tar for _, tar in found]
    _check_dotted(tars)
    table = pa.concat_tables(table for table, _ in found)
    no_labels = next((tar.no_label for tar in tars if tar.no_label), None)
    return Listing(_without_labels(table) if no_labels else table, no_labels)


def _fragments(tar: _TarSamples) -> pa.Table:
    """Group the samples of a tar into fragments."""
    offsets, sizes = np.array(tar.offsets, np.int64), np.array(tar.sizes, np.int64)
    ends, starts = offsets + sizes, [0]
    while starts[-1] < len(offsets):
        start = starts[-1]
        stop = int(np.searchsorted(ends, offsets[start] + _FRAGMENT_BYTES, side="right"))
        starts.append(max(start + 1, min(start + _FRAGMENT_SAMPLES, stop)))
    columns = (pa.array(tar.keys, pa.string()), offsets, sizes, np.array(tar.labels, np.int64))
    samples = pa.StructArray.from_arrays([pa.array(column) for column in columns], fields=_SAMPLE)
    return pa.table(
        {
            "path": [tar.path] * (len(starts) - 1),
            "rows": np.diff(starts),
            "samples": pa.ListArray.from_arrays(pa.array(starts, pa.int32()), samples),
        },
        _FRAGMENTS,
    )


def _without_labels(fragments: pa.Table) -> pa.Table:
    """The fragments with all labels set to -1."""
    runs = fragments["samples"].combine_chunks()
    columns = runs.values.flatten()[: len(_SAMPLE) - 1]
    none = pa.array(np.full(len(runs.values), -1))
    samples = pa.StructArray.from_arrays([*columns, none], fields=_SAMPLE)
    runs = pa.ListArray.from_arrays(runs.offsets, samples)
    return fragments.set_column(fragments.schema.get_field_index("samples"), "samples", runs)


def _read_tar(filesystem: fs.FileSystem, path: str, data: DataConfig, ahead: int) -> _TarSamples:
    found = _TarSamples(path)
    try:
        with read_ahead(filesystem, path, ahead) as (file, size):
            parts = _parts(members(file, size), data, path, file)
            for _, group in groupby(parts, itemgetter(0)):
                _add(found, list(group), data)
    except tarfile.ReadError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return found


def _parts(walk: Iterable[Member], data: DataConfig, path: str, file: BinaryIO) -> Iterator[_Part]:
    """The files of a tar. Raises ValueError for an image or class that is a duplicate or a link."""
    seen: set[str] = set()
    for member in walk:
        if member.type == tarfile.DIRTYPE or _is_passed_over(member.name):
            continue
        key, ending = _split(member.name, data.key_dot)
        is_image, is_class, content = ending.endswith(IMAGE_ENDINGS), ending.endswith(_CLASS), b""
        if is_image or is_class:
            if member.type not in tarfile.REGULAR_TYPES:
                raise ValueError(
                    f"{member.name} of {path} is a link, or not a regular file; write the tar again with the "
                    "files themselves, as tar --dereference --hard-dereference does"
                )
            if member.name in seen:
                raise ValueError(f"{member.name} occurs twice in {path}; write it again, each name once")
            seen.add(member.name)
        if is_class:
            # Read it now, while it is in the buffer with its header.
            file.seek(member.offset)
            content = file.read(min(member.size, _LABEL_BYTES))
        yield _Part(key, ending, member, is_image, content)


def _split(name: str, dot: str) -> tuple[str, str]:
    """A member's key and ending: the path split at the first or last dot of the file name."""
    folder, slash, last = name.rpartition("/")
    at = last.find(".") if dot == "first" else last.rfind(".")
    at = len(last) if at < 0 else at
    return folder + slash + last[:at], last[at:].lower()


def _is_passed_over(name: str) -> bool:
    """Whether the member is hidden, which WebDataset ignores (macOS adds a ._NAME to each NAME), or junk."""
    folder, _, last = name.rpartition("/")
    return last.startswith(".") or _is_hidden(folder)


@lru_cache
def _is_hidden(folder: str) -> bool:
    folders = folder.split("/")
    return any(part.startswith(".") and part.strip(".") for part in folders) or not JUNK.isdisjoint(folders)


def _add(found: _TarSamples, group: list[_Part], data: DataConfig) -> None:
    """Add the sample or samples of one key; a group without an image has none."""
    classes = {part.ending: part for part in group if part.ending.endswith(_CLASS)}
    images = _images(group, data)
    if len(images) > 1:
        if data.key_dot == "last" or data.image_ending or any(part.is_plain for part in group):
            raise _several(images, found.path, data.key_dot)
        found.dotted.append(images)
    for image in images:
        own = image.ending.rpartition(".")[0] + _CLASS
        label = _label(classes.get(_CLASS) or classes.get(own), found.path)
        key = image.key if len(images) == 1 else image.stem
        if isinstance(label, str) and not found.no_label:
            found.no_label = f"{key} of {found.path} has {label}"
        found.keys.append(key)
        found.offsets.append(image.member.offset)
        found.sizes.append(image.member.size)
        found.labels.append(-1 if isinstance(label, str) else label)


def _images(group: list[_Part], data: DataConfig) -> list[_Part]:
    """The image of a sample: the one that data.image_ending names, else the plain one, else all images."""
    images = [part for part in group if part.is_image]
    if len(images) < 2:
        return images
    named = "." + (data.image_ending or "").lstrip(".").lower()
    for chosen in ([part for part in images if part.ending == named], [p for p in images if p.is_plain]):
        if len(chosen) == 1:
            return chosen
    return images


def _check_dotted(tars: list[_TarSamples]) -> None:
    """Raise ValueError if images that share a key may belong to one sample.

    They do if an ending repeats, such as .left.jpg under each key. If none repeats, the dots are part of the
    names, as in 2021.05.03-0.jpg and 2021.05.03-1.jpg.
    """
    seen: set[str] = set()
    for tar in tars:
        for images in tar.dotted:
            endings = {image.ending for image in images}
            if len(endings) < len(images) or not seen.isdisjoint(endings):
                raise _several(images, tar.path, "first")
            seen |= endings


def _several(images: list[_Part], path: str, dot: str) -> ValueError:
    names = [image.member.name for image in images]
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    way_out = "" if dot == "last" else ", or, if dots belong to the names, set --data.key-dot last"
    return ValueError(
        f"{path} has several images under the key {images[0].key}: {shown}; choose one, as in "
        f"--data.image-ending {images[0].ending.lstrip('.')}{way_out}"
    )


def _label(part: _Part | None, path: str) -> int | str:
    """The class in a .cls member, or text that says why there is none."""
    if part is None:
        return "no .cls beside it"
    # Windows editors may add a byte order mark.
    text = part.content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace").strip()
    if not text:
        return "an empty .cls"
    label = int(text) if _NUMBER.fullmatch(text) else None
    if label is None or not -1 <= label <= _LARGEST_LABEL:
        raise ValueError(f"{path}: {part.member.name} is {part.content[:20]!r}, not a whole number from 0")
    return label


def labels(fragments: pa.Table) -> Int[np.ndarray, " rows"]:
    """The label of each sample of an index's fragments, -1 where it has none."""
    samples = pc.list_flatten(fragments["samples"])  # pyright: ignore[reportAttributeAccessIssue]
    return pc.struct_field(samples, "label").to_numpy()  # pyright: ignore[reportAttributeAccessIssue]


def read_pieces(filesystem: fs.FileSystem, pieces: list[dict], pool: Executor) -> pa.Table:
    """Samples [start, stop) of each fragment, as base.ROWS; one read for each piece."""
    return pa.concat_tables(pool.map(lambda piece: _read_piece(filesystem, piece), pieces))


def _read_piece(filesystem: fs.FileSystem, piece: dict) -> pa.Table:
    path, samples = piece["path"], piece["samples"][piece["start"] : piece["stop"]]
    first = min(sample["offset"] for sample in samples)
    last = max(sample["offset"] + sample["size"] for sample in samples)

    def read() -> bytes:
        with filesystem.open_input_file(path) as file:
            return file.read_at(last - first, first)

    content = memoryview(reading(read, path))

    if len(content) < last - first:
        raise ValueError(f"cannot read {path}: it is shorter than when it was indexed; {CHANGED}")

    columns = {
        "image": [bytes(content[s["offset"] - first :][: s["size"]]) for s in samples],
        "label": [s["label"] for s in samples],
        "path": [path] * len(samples),
        "key": [s["key"] for s in samples],
    }
    return pa.table(columns, schema=ROWS)
