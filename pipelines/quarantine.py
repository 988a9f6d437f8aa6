"""Images that could not be used: which, where and why, in the run's quarantine.jsonl."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from pipelines import storage
from pipelines.formats.base import Identity
from pipelines.images.isolation import ENDS_PROCESS
from pipelines.index import Index
from pipelines.storage.checksums import decode_lines, encode_lines, read_lines

_FILE = "quarantine.jsonl"

# Beside Parquet shards: readers of Parquet data sets pass over names that begin with _.
BESIDE_SHARDS = f"_{_FILE}"

# Where so many images are bad that nothing can be done with the others.
WAY_OUT = "mend them; diptych data inspect URI --decode counts all faults"


@dataclass(frozen=True)
class Quarantined:
    """An image that was left out: the file that holds it, its key there, and the reason.

    sample: its number in the data set, from 0; None where an earlier version has written it down.
    """

    path: str
    key: str
    reason: str
    sample: int | None = None

    @property
    def identity(self) -> Identity:
        return self.path, self.key, self.sample


class Quarantine:
    """The images that a run has left out, each once, over all workers and resumes."""

    def __init__(self, run: str, name: str = _FILE) -> None:
        """Goes on from what an earlier part of the run has written."""
        self._uri = storage.join(run, name)
        self._found = {image.identity: image for image in read_quarantine(self._uri)}
        self._unsaved = False

    def __len__(self) -> int:
        return len(self._found)

    @property
    def crashes(self) -> dict[Identity, str]:
        """Each image whose decoding ends the process, and the reason."""
        return {
            identity: image.reason
            for identity, image in self._found.items()
            if image.reason.startswith(ENDS_PROCESS)
        }

    def add(self, images: Iterable[Quarantined]) -> None:
        """Keep those that are new."""
        before = len(self._found)
        for image in images:
            self._found.setdefault(image.identity, image)
        self._unsaved |= len(self._found) > before

    def write(self) -> None:
        """Write all of them down, if there are new ones."""
        if self._unsaved:
            storage.write(self._uri, encode(self._found.values()))
            self._unsaved = False

    def check(self, index: Index, most: float) -> None:
        """Raise ValueError where more than the share `most` of the index's images was left out."""
        paths, images = set(index.paths), int(index.rows.sum())
        bad = [image for image in self._found.values() if image.path in paths]
        if len(bad) > most * images:
            raise ValueError(
                f"{len(bad):,} of {images:,} images are no good, more than data.max_bad_share={most:g}; the "
                f"first is {bad[0].key} of {bad[0].path}: {bad[0].reason}; see {self._uri}; mend them or "
                "raise --data.max-bad-share"
            )


def encode(images: Iterable[Quarantined]) -> bytes:
    """One JSON object a line."""
    return encode_lines(asdict(image) for image in images)


def decode(lines: bytes) -> list[Quarantined]:
    """What encode was given."""
    return [Quarantined(**line) for line in decode_lines(lines, "the quarantine")]


def read_quarantine(uri: str) -> list[Quarantined]:
    """The images in a quarantine.jsonl, none where there is no such file; ValueError where it is damaged."""
    return [Quarantined(**line) for line in read_lines(uri)]
