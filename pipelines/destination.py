"""Where a command writes its shards: whose they are, so that only the same command goes on with them."""

from typing import Any, Literal

from pipelines import storage
from pipelines.checksums import checked_json
from pipelines.json_lines import encode_lines

# Readers of Parquet data sets pass over names that begin with _.
_MANIFEST = "_source.json"

Command = Literal["pack", "embed"]


def claim(dest: str, command: Command, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier part of the same command noted at `dest`, or None where nothing is there yet.

    Values of `wanted` that are None match any. Raises ValueError where something else is there.
    """
    try:
        theirs = _noted(storage.join(dest, _MANIFEST))
        others = [] if theirs or not storage.exists(dest) else storage.listing(dest)
    except OSError as error:
        raise ValueError(f"cannot write {dest}: {storage.first_line(error)}; choose another DEST") from error
    if others:
        raise ValueError(f"{dest} is taken: {others[0].path} is there already; choose another DEST")
    if theirs is None:
        return None
    if theirs.get("command") != command:
        raise ValueError(f"{dest} was written by `diptych data {theirs.get('command')}`; choose another DEST")
    differing = [
        f"{name} ({theirs.get(name)} there, {value} here)"
        for name, value in wanted.items()
        if value is not None and theirs.get(name) != value
    ]
    if differing:
        raise ValueError(f"{dest} holds shards with another {', '.join(differing)}; choose another DEST")
    return theirs


def _noted(uri: str) -> dict[str, Any] | None:
    """What `note` has written; as an earlier version wrote it, it takes several lines."""

    def parsed(content: bytes) -> dict[str, Any]:
        try:
            return checked_json(content.rstrip())
        except ValueError as error:
            raise ValueError(f"{uri} is damaged: {error}; restore it, or choose another DEST") from error

    return storage.read_as(parsed, uri)


def note(dest: str, command: Command, settled: dict[str, Any]) -> None:
    """Note at `dest` what is written there; raises ValueError where it cannot be written."""
    content = encode_lines([{"command": command, **settled}])
    try:
        storage.write(storage.join(dest, _MANIFEST), content)
    except OSError as error:
        raise ValueError(f"cannot write {dest}: {storage.first_line(error)}; choose another DEST") from error
