"""The bad images of a run, with the reason for each, in its quarantine.jsonl."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from pipelines import storage
from pipelines.formats.base import Identity
from pipelines.images.isolation import ENDS_PROCESS
from pipelines.index import Index
from pipelines.storage.checksums import decode_lines, encode_lines, read_lines

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
        self._found = {image.identity: image for image in read_quarantine(self._uri)}
        self._unsaved = False

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
        before = len(self._found)
        for image in images:
            self._found.setdefault(image.identity, image)
        self._unsaved |= len(self._found) > before

    def write(self) -> None:
        """Write the file, if images were added."""
        if self._unsaved:
            storage.write(self._uri, encode(self._found.values()))
            self._unsaved = False

    def check(self, index: Index, most: float) -> None:
        """Raise ValueError if more than the share `most` of the index's images is quarantined."""
        paths, images = set(index.paths), int(index.rows.sum())
        bad = [image for image in self._found.values() if image.path in paths]
        if len(bad) > most * images:
            raise ValueError(
                f"{len(bad):,} of {images:,} images are bad, more than data.max_bad_share={most:g}; the "
                f"first is {bad[0].key} of {bad[0].path}: {bad[0].reason}; see {self._uri}; repair them or "
                "raise --data.max-bad-share"
            )


def encode(images: Iterable[Quarantined]) -> bytes:
    """JSON lines, one for each image."""
    return encode_lines(asdict(image) for image in images)


def decode(lines: bytes) -> list[Quarantined]:
    """The inverse of encode. Raises ValueError for a damaged line."""
    return [Quarantined(**line) for line in decode_lines(lines, "the quarantine")]


def read_quarantine(uri: str) -> list[Quarantined]:
    """The images in a quarantine.jsonl; empty without such a file. Raises ValueError if it is damaged."""
    return [Quarantined(**line) for line in read_lines(uri)]
