"""The bad images of a run, with the reason for each, in its quarantine.jsonl."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipelines import storage
from pipelines.formats.base import Identity
from pipelines.images.isolation import ENDS_PROCESS
from pipelines.index import Index
from pipelines.storage.checksums import decode_lines, encode_lines

_FILE = "quarantine.jsonl"

# Its name beside Parquet shards: readers of Parquet data sets skip names that begin with _.
BESIDE_SHARDS = f"_{_FILE}"

# The way out if too many images are bad.
WAY_OUT = "repair them; diptych data inspect URI --decode counts all bad images"


@dataclass(frozen=True)
class Quarantined:
    """A quarantined image: its file, its key there, and the reason.

    sample: its number in the data set, from 0; None in files of an earlier version.
    """

    path: str
    key: str
    reason: str
    sample: int | None = None

    @property
    def identity(self) -> Identity:
        return self.path, self.key, self.sample


class Quarantine:
    """The quarantined images of a run, each once, over all workers and resumes."""

    def __init__(self, run: str, name: str = _FILE) -> None:
        """Reads the images that an earlier part of the run has recorded."""
        self._uri = storage.join(run, name)
        # Encoded once, as it may have 100,000 lines; object storage cannot append to the file itself.
        self._content, lines = _read(self._uri)
        self._found = {image.identity: image for image in lines}
        self._new: list[Quarantined] = []
        self._unsaved = False
        self._index: Index | None = None
        self._bad: list[Quarantined] = []
        self._checked = 0

    def __len__(self) -> int:
        return len(self._found)

    @property
    def crashes(self) -> dict[Identity, str]:
        """The images whose decoding crashes the process, with the reasons."""
        return {
            identity: image.reason
            for identity, image in self._found.items()
            if image.reason.startswith(ENDS_PROCESS)
        }

    def add(self, images: Iterable[Quarantined]) -> None:
        """Add the images that are not yet included."""
        for image in images:
            if image.identity not in self._found:
                self._found[image.identity] = image
                self._new.append(image)

    def write(self) -> None:
        """Write the file, if images were added."""
        if self._new:
            self._content += encode(self._new)
            self._new, self._unsaved = [], True
        if self._unsaved:
            storage.write(self._uri, self._content)
            self._unsaved = False

    def check(self, index: Index, most: float) -> None:
        """Raise ValueError if more than the share `most` of the index's images is quarantined."""
        bad, images = self._bad_of(index), int(index.rows.sum())
        if len(bad) > most * images:
            raise ValueError(
                f"{len(bad):,} of {images:,} images are bad, more than data.max_bad_share={most:g}; the "
                f"first is {bad[0].key} of {bad[0].path}: {bad[0].reason}; see {self._uri}; repair them or "
                "raise --data.max-bad-share"
            )

    def _bad_of(self, index: Index) -> list[Quarantined]:
        """The quarantined images of `index`; only those added since the last call are looked up."""
        if index is not self._index:
            self._index, self._bad, self._checked = index, [], 0
        added = list(islice(self._found.values(), self._checked, None))
        held = index.holding(image.path for image in added)
        self._bad += [image for image in added if image.path in held]
        self._checked = len(self._found)
        return self._bad


def encode(images: Iterable[Quarantined]) -> bytes:
    """JSON lines, one for each image."""
    return encode_lines(vars(image) for image in images)


def decode(lines: bytes) -> list[Quarantined]:
    """The inverse of encode. Raises ValueError for a damaged line."""
    return [Quarantined(**line) for line in decode_lines(lines, "the quarantine")]


def read_quarantine(uri: str) -> list[Quarantined]:
    """The images in a quarantine.jsonl; empty without such a file. Raises ValueError if it is damaged."""
    return _read(uri)[1]


def _read(uri: str) -> tuple[bytes, list[Quarantined]]:
    """The content of the file, which ends with a whole line, and its images."""

    def parsed(content: bytes) -> tuple[bytes, list[dict[str, Any]]]:
        return content, decode_lines(content, uri)

    content, lines = storage.read_as(parsed, uri) or (b"", [])
    if content and not content.endswith(b"\n"):
        content += b"\n"  # An editor has removed it.
    return content, [Quarantined(**line) for line in lines]
