"""A run's config.toml, by which a resume recognises it, and its lists of images."""

import re
import tomllib
from dataclasses import asdict
from typing import Any

import tomli_w

from pipelines import storage
from pipelines.index import Index
from pipelines.storage.checksums import ChecksumError, checked_toml, toml_with_checksum
from training.config import TrainConfig, identity

_FILE = "config.toml"

# Format of the TOML files of runs and searches. Raise it with each change that gives an existing file another
# meaning: a new field, another default, other weights or other images from the same fields.
FORMAT = 1
_FORMAT_LINE = re.compile(r"# format: (\d+)\n")


def find_run(run: str, config: TrainConfig) -> bool:
    """Whether this run exists already, with this config.

    Raises ValueError where it has another config, naming the fields, or another format, or cannot be read.
    """
    try:
        existing = kept_toml(storage.join(run, _FILE), resumed=True)
    except OSError as error:
        raise unwritable(run, error) from error
    if existing is None:
        return False
    theirs = identity(TrainConfig(**existing))
    differing = sorted(_differences(theirs, identity(config)))
    if differing:
        raise ValueError(f"{run} is a run with other values of {', '.join(differing)}; try another --name")
    return True


def claim_run(run: str, config: TrainConfig) -> None:
    """Write RUN/config.toml; raises ValueError as find_run does, or where it cannot be written."""
    find_run(run, config)
    try:
        storage.write(storage.join(run, _FILE), encode_toml(to_values(config)))
    except OSError as error:
        raise unwritable(run, error) from error


def unwritable(run: str, error: OSError) -> ValueError:
    """The error for a run that cannot be written."""
    return ValueError(f"cannot write {run}: {storage.first_line(error)}; choose another --output")


def read_config(run: str) -> TrainConfig:
    """The config of the run in RUN; raises ValueError as read_values does."""
    return TrainConfig(**read_values(run))


def read_values(run: str, *, resumed: bool = False) -> dict[str, Any]:
    """Values of the run's config; output and name are its current ones, even if it was moved.

    Raises ValueError where there is no run, and as kept_toml does.
    """
    run = storage.absolute(run.rstrip("/"))
    values = kept_toml(storage.join(run, _FILE), resumed=resumed)
    if values is None:
        raise ValueError(f"{run} is not a run: it has no {_FILE}; give OUTPUT/NAME of one")
    output, _, name = run.rpartition("/")
    return values | {"output": output, "name": name}


def encode_toml(values: dict[str, Any]) -> bytes:
    """Content of a TOML file for kept_toml, with its format and checksum."""
    return toml_with_checksum(f"# format: {FORMAT}\n{tomli_w.dumps(values)}")


def kept_toml(uri: str, *, resumed: bool = False) -> dict[str, Any] | None:
    """Values of a TOML file written by encode_toml; None where there is no file.

    Raises ValueError where it is damaged. With `resumed`, also where its format is another, since its fields
    or defaults may then have had another meaning.
    """

    def parsed(content: bytes) -> dict[str, Any]:
        try:
            text = checked_toml(content)
            values = tomllib.loads(text)
        except ChecksumError as error:
            way_out = "restore it, or, if you have edited it, delete the line with its crc32"
            raise ValueError(f"{uri} is damaged: {error}; {way_out}") from error
        except ValueError as error:  # Of TOML, or of UTF-8.
            raise ValueError(f"{uri} is damaged: {error}; restore it") from error
        if not values:
            raise ValueError(f"{uri} is damaged: it is empty; restore it")
        found = _FORMAT_LINE.match(text)
        if resumed and (not found or int(found[1]) != FORMAT):
            theirs = found[1] if found else "older than 1"
            raise ValueError(
                f"{uri} was written by another version of diptych (its format is {theirs}, this version's "
                f"{FORMAT}); resume with that version, or start a new run with another --name"
            )
        return values

    return storage.read_as(parsed, uri)


def keep_index(run: str, name: str, index: Index) -> None:
    """Save the list of the run's images `name`, so that a resume or report need not list them again."""
    storage.write(_index_place(run, name), index.to_bytes())


def kept_index(run: str, name: str) -> Index | None:
    """The list that keep_index saved; None where there is none."""
    place = _index_place(run, name)

    def parsed(content: bytes) -> Index:
        try:
            return Index.from_bytes(content)
        except (ValueError, OSError, LookupError) as error:
            why = storage.first_line(error)
            way_out = "restore it or, if no image was added or removed since, delete it to list them again"
            raise ValueError(f"{place} is damaged: {why}; {way_out}") from error

    return storage.read_as(parsed, place)


def _index_place(run: str, name: str) -> str:
    return storage.join(run, "index", f"{name}.parquet")


def to_toml(config: TrainConfig) -> str:
    """All fields that have a value, as TOML for TrainConfig."""
    return tomli_w.dumps(to_values(config))


def to_values(config: TrainConfig) -> dict[str, Any]:
    """All fields that have a value.

    Fields of the second view that equal the first's are omitted, so that a flag for `view` sets both.
    """
    values = asdict(config)
    view, second = values["data"]["view"], values["data"]["second_view"]
    differing = {key: value for key, value in second.items() if value != view[key]}
    values["data"]["second_view"] = differing or None
    return _without_none(values)


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }


def _differences(left: dict[str, Any], right: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ."""
    found = []
    for key in left:
        if isinstance(left[key], dict):
            found += _differences(left[key], right[key], f"{prefix}{key}.")
        elif left[key] != right[key]:
            found.append(prefix + key)
    return found
