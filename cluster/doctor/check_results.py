"""The result of a check, and the table of all results."""

import shutil
import sys
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class CheckResult:
    """The result of one check: what was found, where, and how to fix it.

    An error would stop a run; a warning would not.
    """

    check: str
    where: str
    found: str
    level: Level = "ok"
    way_out: str = ""


# Width of the table where there is no terminal.
_LOG_WIDTH = 160

_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def print_results(results: list[CheckResult]) -> None:
    """Print a row for each result, with its way out below."""
    table = Table(box=None, pad_edge=False)
    for heading in ("", "check", "where", "found"):
        table.add_column(heading, overflow="fold")
    for result in results:
        found = f"{result.found}\n-> {result.way_out}" if result.way_out else result.found
        # Text, because rich would take brackets in a node's answer for a style.
        table.add_row(Text(result.level, _COLOURS[result.level]), result.check, result.where, Text(found))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _LOG_WIDTH
    Console(width=width).print(table)
