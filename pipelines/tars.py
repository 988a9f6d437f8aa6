"""WebDataset tars: a fragment is a run of samples that lie side by side, known from the tar's headers.

Members that follow each other and share a key, their name up to its first dot, are one sample: an image, and
its class as a whole number in a member that ends in .cls. Aizman et al. 2019, section 3.
"""

import io
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int
from pyarrow import fs

from pipelines.config import DataConfig
from pipelines.layout import CHANGED, IMAGE_ENDINGS, JUNK, ROWS, Listing, Place, reading
from pipelines.tar_headers import Member, members

ENDINGS = (".tar",)

# What is read at once: large enough for object storage, small enough to shuffle.
_FRAGMENT_BYTES = 4 << 20
_FRAGMENT_SAMPLES = 256

# Headers lie between members; small members come along with them.
_BUFFER = 1 << 16

_CLASS = ".cls"
_LARGEST_LABEL = 2**63 - 1
_NUMBER = re.compile(r"[+-]?[0-9]+")

# More than any label needs, should something else have that ending.
_LABEL_BYTES = 64

# Members that an error lists.
_SHOWN = 4

_SAMPLE = pa.struct(
    [("key", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("label", pa.int64())]
)
_FRAGMENTS = pa.schema({"path": pa.string(), "rows": pa.int64(), "samples": pa.list_(_SAMPLE)})


class _Part(NamedTuple):
    """A member as a part of the sample of its key.

    ending: from the dot that ends the key, in lower case. content: that of a class, as far as a number goes.
    """

    key: str
    ending: str
    member: Member
    content: bytes = b""

    @property
    def is_image(self) -> bool:
        return self.ending.endswith(IMAGE_ENDINGS)

    @property
    def is_plain(self) -> bool:
        """Whether the ending has no further dot, as a sample's own parts have."""
        return self.ending.count(".") == 1

    @property
    def stem(self) -> str:
        """The name without its last ending."""
        return self.member.name.rpartition(".")[0]


@dataclass
class _Found:
    """The samples of one tar.

    no_label: which sample has no label, if one has none. dotted: groups of images that share a key, each of
    which counts as a sample of its own.
    """

    path: str
    samples: list[dict[str, Any]] = field(default_factory=list)
    no_label: str | None = None
    dotted: list[list[_Part]] = field(default_factory=list)


def index_files(
    filesystem: fs.FileSystem,
    files: list[Place],
    data: DataConfig,
    pool: Executor,
    done: Callable[[], None],
) -> Listing:
    """The samples of `files`, which have labels if all have a .cls member.

    Raises ValueError for a tar that cannot be read whole, a name that is there twice, a class that is no
    number, and where nothing says which of a sample's images is meant.
    """

    def samples(file: Place) -> _Found:
        found = reading(lambda: _read_tar(filesystem, file.path, data), file.path)
        done()
        return found

    tars = list(pool.map(samples, files))
    _check_dotted(tars)
    no_labels = next((tar.no_label for tar in tars if tar.no_label), None)
    if no_labels:
        for sample in (sample for tar in tars for sample in tar.samples):
            sample["label"] = -1
    rows = [fragment for tar in tars for fragment in _fragments(tar)]
    return Listing(pa.Table.from_pylist(rows, schema=_FRAGMENTS), no_labels)


def _fragments(tar: _Found) -> Iterator[dict[str, Any]]:
    run: list[dict[str, Any]] = []
    for sample in tar.samples:
        if run and (
            len(run) == _FRAGMENT_SAMPLES
            or sample["offset"] + sample["size"] - run[0]["offset"] > _FRAGMENT_BYTES
        ):
            yield {"path": tar.path, "rows": len(run), "samples": run}
            run = []
        run.append(sample)
    if run:
        yield {"path": tar.path, "rows": len(run), "samples": run}


def _read_tar(filesystem: fs.FileSystem, path: str, data: DataConfig) -> _Found:
    found = _Found(path)
    try:
        with filesystem.open_input_file(path) as file:
            buffered = cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, file), _BUFFER))
            parts = _parts(members(buffered, file.size()), data, path, buffered)
            for _, group in groupby(parts, lambda part: part.key):
                _add(found, list(group), data)
    except tarfile.ReadError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return found


def _parts(walk: Iterable[Member], data: DataConfig, path: str, file: BinaryIO) -> Iterator[_Part]:
    """The files of a tar; raises ValueError for an image or class that is there twice, or is a link."""
    seen: set[str] = set()
    for member in walk:
        part = _Part(*_split(member.name, data.key_dot), member)
        if member.type == tarfile.DIRTYPE or _is_passed_over(member.name):
            continue
        if part.is_image or part.ending.endswith(_CLASS):
            if member.type not in tarfile.REGULAR_TYPES:
                raise ValueError(
                    f"{member.name} of {path} is a link, or no file; write the tar anew with the files "
                    "themselves, as tar --dereference --hard-dereference does"
                )
            if member.name in seen:
                raise ValueError(f"{member.name} is twice in {path}; write it anew, each name once")
            seen.add(member.name)
        if part.ending.endswith(_CLASS):
            # At once, as long as it lies in the buffer with its header.
            file.seek(member.offset)
            part = part._replace(content=file.read(min(member.size, _LABEL_BYTES)))
        yield part


def _split(name: str, dot: str) -> tuple[str, str]:
    """A member's key and ending: the name up to that dot of its last part, and the rest."""
    folder, slash, last = name.rpartition("/")
    at = last.find(".") if dot == "first" else last.rfind(".")
    at = len(last) if at < 0 else at
    return folder + slash + last[:at], last[at:].lower()


def _is_passed_over(name: str) -> bool:
    """Whether WebDataset has no key for it, as for the ._NAME beside each NAME of macOS; or it is junk."""
    folder, _, last = name.rpartition("/")
    folders = folder.split("/")
    hidden = any(part.startswith(".") and part.strip(".") for part in folders)
    return last.startswith(".") or hidden or not JUNK.isdisjoint(folders)


def _add(found: _Found, group: list[_Part], data: DataConfig) -> None:
    """Add what the parts of one key are: a sample, none without an image, or several."""
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
        where = {"key": key, "offset": image.member.offset, "size": image.member.size}
        found.samples.append({**where, "label": -1 if isinstance(label, str) else label})


def _images(group: list[_Part], data: DataConfig) -> list[_Part]:
    """The image of a sample: the one that is named, else the plain one; all where that says nothing."""
    images = [part for part in group if part.is_image]
    named = "." + (data.image_ending or "").lstrip(".").lower()
    for chosen in ([part for part in images if part.ending == named], [p for p in images if p.is_plain]):
        if len(chosen) == 1:
            return chosen
    return images


def _check_dotted(tars: list[_Found]) -> None:
    """Raise ValueError where images that share a key may be those of one sample.

    They are where an ending comes back, as .left.jpg does under each key. Where none does, the dots are the
    names' own, as in 2021.05.03-0.jpg and 2021.05.03-1.jpg.
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
    way_out = "" if dot == "last" else ", or, where dots belong to the names, set --data.key-dot last"
    return ValueError(
        f"{path} has several images under the key {images[0].key}: {shown}; name one as in "
        f"--data.image-ending {images[0].ending.lstrip('.')}{way_out}"
    )


def _label(part: _Part | None, path: str) -> int | str:
    """The class that a .cls member holds, or in words that there is none."""
    if part is None:
        return "no .cls beside it"
    text = part.content.decode("utf-8-sig", "replace").strip()
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
    """Samples [start, stop) of each fragment, as layout.ROWS; one read a piece."""
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
