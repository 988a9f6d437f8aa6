"""Fill flags that were not given from a TOML file, or from a run's own config."""

import tomllib
from pathlib import Path
from typing import Any

import cyclopts.config
from cyclopts import App
from cyclopts.argument import ArgumentCollection

from training.config import shipped_config


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; `name` defaults to the file's. Raises ValueError for a file that is not TOML."""
    try:
        return {"name": path.stem} | tomllib.loads(path.read_text("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; give this user the permission") from error


def read_config_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill the flags that were not given from the TOML file that CONFIG names, or the run to --resume."""
    given = {argument.name: argument.tokens[0].value for argument in arguments if argument.tokens}
    if "CONFIG" in given and "--resume" in given:
        raise ValueError("give a CONFIG or --resume RUN, not both: a run has its own config")
    if "CONFIG" in given:
        name = given["CONFIG"]
        if Path(name).is_dir() or "://" in name:
            raise ValueError(f"{name} is not a config; give images as --data.train {name}")
        path = Path(name) if Path(name).is_file() else shipped_config(name)
        values = read_toml(path)
    elif "--resume" in given:
        from training.run_folder import read_values  # Takes half a second to import.

        path, values = given["--resume"], read_values(given["--resume"], resumed=True)
    else:
        return
    for command in reversed(commands):  # Cyclopts drops `data` from a flat table: a command has that name.
        values = {command: values}
    cyclopts.config.Dict(values, source=str(path))(app, commands, arguments)
