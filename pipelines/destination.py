"""Where a command writes its shards: whose they are, so that only the same command goes on with them."""

import json
from typing import Any, Literal

from pipelines import storage

# Readers of Parquet data sets pass over names that begin with _.
_MANIFEST = "_source.json"

Command = Literal["pack", "embed"]


def claim(dest: str, command: Command, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier part of the same command noted at `dest`, or None where nothing is there yet.

    Values of `wanted` that are None match any. Raises ValueError where something else is there.
    """
    try:
        noted = storage.read(storage.join(dest, _MANIFEST))
        others = [] if noted or not storage.exists(dest) else storage.listing(dest)
    except OSError as error:
        raise ValueError(f"cannot write {dest}: {storage.first_line(error)}; choose another DEST") from error
    if others:
        raise ValueError(f"{dest} is taken: {others[0].path} is there already; choose another DEST")
    if noted is None:
        return None
    theirs = json.loads(noted)
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


def note(dest: str, command: Command, settled: dict[str, Any]) -> None:
    """Note at `dest` what is written there; raises ValueError where it cannot be written."""
    content = json.dumps({"command": command, **settled}, indent=1).encode()
    try:
        storage.write(storage.join(dest, _MANIFEST), content)
    except OSError as error:
        raise ValueError(f"cannot write {dest}: {storage.first_line(error)}; choose another DEST") from error
