"""What a data set holds: its images counted by class, size, format and fault."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from pipelines.batches import Rows
from pipelines.config import DataConfig
from pipelines.decoding import faults
from pipelines.header import image_format
from pipelines.mixing import WAY_OUT, Mixing
from pipelines.reader import Reading, read_pieces
from pipelines.sources import Index

# What is counted of each good image; its height and its width come apart from its pixels.
_COUNTED = ("labels", "formats", "heights", "widths", "pixels")
_EXAMPLES = 3

# Rows of the same few fragments share all windows, and each image folder's file is a request of its own.
_FEW_FRAGMENTS, _MANY_FILES = 16, 1000


@dataclass
class Survey:
    """Counts of each value among the good images, their bytes, and the bad ones by reason.

    bad: for each reason the number of images and a few of them, as (key, path). row_labels: of every row, the
    bad ones too, in the order in which readings were added.
    """

    labels: Counter = field(default_factory=Counter)
    formats: Counter = field(default_factory=Counter)
    heights: Counter = field(default_factory=Counter)
    widths: Counter = field(default_factory=Counter)
    pixels: Counter = field(default_factory=Counter)
    bytes: int = 0
    bad: dict[str, tuple[int, list[tuple[str, str]]]] = field(default_factory=dict)
    row_labels: list[Int[np.ndarray, " rows"]] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Good images."""
        return self.formats.total()

    @property
    def bad_images(self) -> int:
        return sum(count for count, _ in self.bad.values())

    def add(self, other: "Survey") -> None:
        """Count what `other` has counted too."""
        for name in _COUNTED:
            getattr(self, name).update(getattr(other, name))
        self.bytes += other.bytes
        self.row_labels += other.row_labels
        for reason, (count, examples) in other.bad.items():
            before, known = self.bad.get(reason, (0, []))
            self.bad[reason] = before + count, (known + examples)[:_EXAMPLES]


def survey(reading: Reading, data: DataConfig, *, decode: bool) -> Survey:
    """What the reading's images are; with `decode` those are bad too whose pixels do not decode."""
    rows = Rows.of(read_pieces(reading, data, own_bytes=True))
    if decode:
        rows = rows.marked(_broken(rows))
    found = Survey(row_labels=[rows.label])
    for bad in rows.quarantined:
        count, examples = found.bad.get(bad.reason, (0, []))
        found.bad[bad.reason] = count + 1, (examples + [(bad.key, bad.path)])[:_EXAMPLES]
    good = rows.good
    found.labels.update(good.label.tolist())
    found.formats.update(image_format(image.tobytes()) for image in good.image)
    found.heights.update(good.height.tolist())
    found.widths.update(good.width.tolist())
    found.pixels.update(good.sizes.prod(axis=1).tolist())
    found.bytes = sum(len(image) for image in good.image)
    return found


def _broken(rows: Rows) -> dict[int, str]:
    """Why each of the good rows does not decode that does not, as training would decode it."""
    good = np.flatnonzero(~rows.is_bad).tolist()
    found = faults(rows.image[row].tobytes() for row in good)
    return {row: fault for row, fault in zip(good, found, strict=True) if fault}


def report(
    index: Index, found: Survey, classes: Sequence[str], window_rows: int, mixing: Mixing | None = None
) -> dict[str, Any]:
    """The survey as what JSON can hold, with what the index says and with hints.

    window_rows, mixing: those of a run's plan.
    """
    return {
        "uri": index.uri,
        "layout": index.layout,
        "files": len(index.paths),
        "fragments": len(index.rows),
        "largest_fragment_rows": int(index.rows.max()),
        "images": found.images,
        "bad_images": found.bad_images,
        "bytes": found.bytes,
        "mean_bytes": round(found.bytes / max(1, found.images)),
        "height": median_spread(found.heights),
        "width": median_spread(found.widths),
        "pixels": median_spread(found.pixels),
        "formats": dict(found.formats.most_common()),
        "classes": _classes(found.labels, classes) if index.has_labels else {},
        "no_labels": index.no_labels,
        "window_rows": window_rows,
        "mixing": asdict(mixing) if mixing else None,
        "bad": [
            {"reason": reason, "images": count, "examples": [f"{key} of {path}" for key, path in examples]}
            for reason, (count, examples) in sorted(found.bad.items(), key=lambda item: -item[1][0])
        ],
        "hints": hints(index, found, window_rows, mixing),
    }


def median_spread(counts: Counter) -> dict[str, int]:
    """Least, median (the lower of two) and most of the values that were counted; nothing where none was."""
    if not counts:
        return {}
    values = sorted(counts)
    ends = np.cumsum([counts[value] for value in values])
    median = values[int(np.searchsorted(ends, (ends[-1] + 1) // 2))]
    return {"min": values[0], "median": median, "max": values[-1]}


def _classes(labels: Counter, names: Sequence[str]) -> dict[str, int]:
    """How many images each class has, by its name, or its number where it has none."""
    numbers = sorted({*labels, *range(len(names))})
    return {names[n] if 0 <= n < len(names) else str(n): labels[n] for n in numbers}


def hints(index: Index, found: Survey, window_rows: int, mixing: Mixing | None = None) -> list[str]:
    """What of the layout will cost time or memory in training, and the way out."""
    said = []
    largest, mean = int(index.rows.max()), found.bytes / max(1, found.images)
    if largest > window_rows:
        said.append(
            f"a row group has up to {largest:,} rows, {largest * mean / 2**20:,.0f} MiB, and is read whole "
            f"where a window has {window_rows:,}; `diptych data pack` it"
        )
    if index.layout == "folder" and len(index.paths) > _MANY_FILES:
        said.append(f"{len(index.paths):,} files are as many requests an epoch; `diptych data pack` them")
    if mixing and mixing.is_poor:
        said.append(f"images are stored by class, and batches would be mixed badly: {WAY_OUT}")
    if not index.has_labels and len(index.rows) < _FEW_FRAGMENTS and found.images > window_rows:
        said.append(
            f"only {len(index.rows)} fragments, and no labels to tell whether images are stored by class: "
            "if they are, `diptych data pack` shuffles them"
        )
    return said
