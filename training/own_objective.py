"""An objective of the user's own: found by MODULE:CLASS, checked, and the file that it comes from."""

import inspect
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from training.objective_config import Option

Base = TypeVar("Base")


def find_own(base: type[Base], name: str, options: Mapping[str, Option]) -> Callable[..., Base]:
    """The subclass of `base` that MODULE:CLASS names; it takes an encoder, gather= and the options.

    Raises ValueError where there is none, or it does not take the options.
    """
    attribute = name.partition(":")[2]
    found = getattr(_module(name), attribute, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(
            f"objective={name} is no class; define class {attribute}(training.{base.__name__}) there"
        )
    try:
        inspect.signature(found).bind(None, gather=None, **options)
    except TypeError as error:
        takes = ", ".join(name for name in list(inspect.signature(found).parameters)[1:] if name != "gather")
        raise ValueError(
            f"objective_options={dict(options)} do not fit {name}, which takes {takes}: {error}"
        ) from error
    return found


def source_of(name: str) -> Path | None:
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
