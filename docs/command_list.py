"""The Sphinx directive `commands`: what each command's --help says, out of the commands themselves."""

import inspect
from collections.abc import Iterator
from typing import Any

from cyclopts import App
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from cluster.cli.main import app as command_line
from docs.fields import parsed

# The other flags of `train` are the config's fields, which have a page of their own.
_OF_TRAIN = ("CONFIG", "--resume")


class Commands(SphinxDirective):
    """`{commands} NAME ...`: these commands and those below them."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[Any]:
        names = self.arguments[0].split()
        return parsed(
            self, [line for name in names for entry in entries(command_line[name], name) for line in entry]
        )


def entries(command: App, path: str) -> Iterator[list[str]]:
    """The Markdown of a command, if it does something by itself, and of those below it."""
    if command.default_command is not None:
        arguments = [one for one in command.assemble_argument_collection(parse_docstring=True) if one.show]
        taken = [one.name for one in arguments if not one.name.startswith("-")]
        shown = [f"[{name}]" if _optional(arguments, name) else name for name in taken]
        signature = " ".join(["diptych", path, *shown])
        yield [f":::{{command}} {signature}", *_description(command), "", *_told(path, arguments), ":::", ""]
    for name in _names(command):
        yield from entries(command[name], f"{path} {name}")


def _told(path: str, arguments: list[Any]) -> list[str]:
    lines = []
    for one in arguments:
        if path == "train" and one.name not in _OF_TRAIN:
            continue
        says = " ".join((one.parameter.help or "").split())
        names = ", ".join(f"`{name}`" for name in one.names if not name.startswith("--empty-"))
        lines += [names, f": {says}", ""]
    return lines


def _optional(arguments: list[Any], name: str) -> bool:
    return any(one.name == name and not one.required for one in arguments)


def _description(command: App) -> list[str]:
    text = inspect.getdoc(command.default_command) or ""
    return text.partition("\nParameters\n")[0].strip().splitlines()


def _names(command: App) -> list[str]:
    return [name for name in command if not name.startswith("-")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive, and the role `command` that links to one."""
    app.add_object_type("command", "command", objname="command")
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
