"""A user's own objective, MODULE:CLASS: its class, and the files that workers elsewhere need."""

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType

from training.config.objective import Option, is_own
from training.objectives import Objective


def own_modules(objective: str, options: Mapping[str, Option] | None = None) -> list[Path]:
    """The file or package of MODULE:CLASS, where it is not installed; none for other objectives.

    It is looked for in the folder at hand too. Raises ValueError where it will not do, or does not take the
    options, where they are known.
    """
    if not is_own(objective):
        return []
    if (here := os.getcwd()) not in sys.path:  # As `python -m` has it.
        sys.path.insert(0, here)
    if options is not None:
        find_own(objective, options)
    source = _source_of(objective)
    return [source] if source else []


def find_own(name: str, options: Mapping[str, Option]) -> Callable[..., Objective]:
    """The subclass of Objective that MODULE:CLASS names; it takes an encoder, gather= and the options.

    Raises ValueError where there is none, or it does not take the options.
    """
    attribute = name.partition(":")[2]
    found = getattr(_module(name), attribute, None)
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise ValueError(f"objective={name} is no class; define class {attribute}(training.Objective) there")
    try:
        inspect.signature(found).bind(None, gather=None, **options)
    except TypeError as error:
        takes = ", ".join(name for name in list(inspect.signature(found).parameters)[1:] if name != "gather")
        raise ValueError(
            f"objective_options={dict(options)} do not fit {name}, which takes {takes}: {error}"
        ) from error
    return found


def _source_of(name: str) -> Path | None:
    """The file or the package of MODULE:CLASS, which workers elsewhere lack; None where it is installed.

    Raises ValueError where there is no such module.
    """
    top = sys.modules[_module(name).__name__.partition(".")[0]]
    path = Path(top.__path__[0] if hasattr(top, "__path__") else top.__file__ or "").resolve()
    return None if {"site-packages", "dist-packages"} & {*path.parts} else path


def _module(name: str) -> ModuleType:
    module = name.partition(":")[0]
    if module == "__main__":
        raise ValueError(
            f"objective={name}: no worker can import __main__; move the class to a file of its own"
        )
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"objective={name}: {error}; have {module.replace('.', '/')}.py in the folder at hand, "
            "or install it"
        ) from error
