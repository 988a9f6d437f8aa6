"""Torchvision's data sets by URI, as in torchvision:CIFAR10?root=DIR&train=true; images come as PNG."""

import inspect
import io
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import pyarrow as pa
from jaxtyping import Int
from PIL import Image

from pipelines.formats.base import ROWS, Listing

SCHEME = "torchvision:"

# Images that one task encodes at a time.
_FRAGMENT_ROWS = 256

# Arguments that are not accepted: the recipe defines the views.
_TRANSFORMS = ("transform", "target_transform", "transforms", "loader", "is_valid_file")


def index_rows(uri: str) -> Listing:
    """List the data set that `uri` names in runs of rows; downloads it only with download=true.

    Raises ValueError for an unknown class or argument, with the nearest name, and if the data are missing.
    """
    dataset = _open(uri)
    try:
        rows = len(dataset)
    except TypeError as error:
        raise ValueError(f"{uri}: {_name(uri)} has no length; choose another data set") from error
    starts = np.arange(0, rows, _FRAGMENT_ROWS)
    fragments = pa.table(
        {
            "path": [plain(uri)] * len(starts),
            "rows": np.minimum(_FRAGMENT_ROWS, rows - starts),
            "first_row": starts,
        }
    )
    if not rows or _label(dataset[0]) is None:
        return Listing(fragments, f"the targets of {plain(uri)} are not whole numbers")
    return Listing(fragments, classes=tuple(map(_class_name, getattr(dataset, "classes", ()))))


def read_pieces(pieces: list[dict], has_labels: bool) -> pa.Table:
    """Rows [start, stop) of each run, as base.ROWS; an image that cannot be opened has no bytes."""
    rows = []
    for piece in pieces:
        dataset = _open(piece["path"])
        for row in range(piece["first_row"] + piece["start"], piece["first_row"] + piece["stop"]):
            rows.append(_row(dataset, row, piece["path"], has_labels))
    return pa.Table.from_pylist(rows, schema=ROWS)


def read_labels(fragment: dict) -> Int[np.ndarray, " rows"]:
    """The label of each row of a run, as in read_pieces.

    Opens no image if the data set lists its targets, as most do.
    """
    dataset, first = _open(fragment["path"]), fragment["first_row"]
    rows = range(first, first + fragment.get("fragment_rows", fragment["rows"]))
    targets: Any = getattr(dataset, "targets", ())
    listed = len(targets) == len(dataset)
    if listed and int(targets[first]) == _row(dataset, first, fragment["path"], True)["label"]:
        return np.array([int(targets[row]) for row in rows])
    return np.array([_row(dataset, row, fragment["path"], True)["label"] for row in rows])


def _row(dataset: Any, row: int, path: str, has_labels: bool) -> dict[str, Any]:
    image, label = None, -1
    try:
        item = dataset[row]
    except (OSError, SyntaxError):  # PIL raises these for a broken image.
        pass
    else:
        image = _png(item[0] if isinstance(item, tuple) else item, path)
        label = _label(item) if has_labels else -1
    return {"image": image, "label": label, "path": path, "key": f"{row:08}"}


def _label(item: Any) -> int | None:
    """The class as a whole number, or None if the target is something else."""
    target = item[1] if isinstance(item, tuple) and len(item) > 1 else None
    is_class = isinstance(target, int | np.integer) and not isinstance(target, bool)
    return int(target) if is_class else None  # pyright: ignore[reportArgumentType]


def _class_name(name: Any) -> str:
    # ImageNet's names are tuples of synonyms.
    return name if isinstance(name, str) else ", ".join(map(str, name))


def _png(image: Any, path: str) -> bytes:
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"{path} gives {type(image).__name__}, not images; choose another data set")
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def absolute(uri: str) -> str:
    """`uri` with an absolute path as its `root`: workers have another working directory."""
    head, _, query = uri.partition("?")
    parts = [part.partition("=") for part in query.split("&") if part]
    given = [
        f"{key}={Path(value).expanduser().absolute() if key == 'root' else value}" for key, _, value in parts
    ]
    return head + ("?" + "&".join(given) if given else "")


def _name(uri: str) -> str:
    return uri.removeprefix(SCHEME).partition("?")[0]


def plain(uri: str) -> str:
    """The URI without download=true: only one process downloads."""
    head, _, query = uri.partition("?")
    kept = [part for part in query.split("&") if part and not part.startswith("download=")]
    return head + ("?" + "&".join(kept) if kept else "")


@lru_cache(maxsize=1)
def _open(uri: str) -> Any:
    import torchvision  # Takes seconds; other formats do not need it.

    names = [name for name in torchvision.datasets.__all__ if name[0].isupper()]
    if _name(uri) not in names:
        raise ValueError(f"torchvision has no data set {_name(uri)!r}{_nearest(_name(uri), names)}")
    dataset = getattr(torchvision.datasets, _name(uri))
    arguments = _arguments(uri, dataset)
    try:
        return dataset(**arguments)
    except TypeError as error:
        raise ValueError(
            f"{uri}: {_first_line(error)}; give it as torchvision:NAME?ARGUMENT=VALUE"
        ) from error
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        accepted = inspect.signature(dataset).parameters
        way_out = "; add download=true to fetch it" if "download" in accepted else ""
        raise ValueError(f"{uri}: {_first_line(error)}{way_out}") from error


def _arguments(uri: str, dataset: Any) -> dict[str, Any]:
    accepted = [name for name in inspect.signature(dataset).parameters if name not in _TRANSFORMS]
    given = parse_qsl(uri.partition("?")[2], keep_blank_values=True)
    for name, _ in given:
        if name not in accepted:
            raise ValueError(f"{uri}: {_name(uri)} has no argument {name!r}{_nearest(name, accepted)}")
    return {name: _value(value) for name, value in given}


def _value(text: str) -> bool | int | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if text.lstrip("-").isdecimal() else text


def _nearest(name: str, names: list[str]) -> str:
    """The way out: the nearest name, ignoring case, else all names."""
    by_lower = {known.lower(): known for known in names}
    close = get_close_matches(name.lower(), by_lower, n=1)
    if close:
        return f"; did you mean {by_lower[close[0]]}?"
    return f"; there are {', '.join(names)}" if names else "; it takes none"


def _first_line(error: Exception) -> str:
    """The first sentence of the error; the next one gives advice for Python code."""
    return str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
