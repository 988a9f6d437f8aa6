"""What a check of a cluster has found, and all of them as a table."""

import shutil
import sys
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Level = Literal["ok", "told", "fault"]


@dataclass(frozen=True)
class Finding:
    """What one check found, where, and the way out; `told` is no fault, but worth a look."""

    check: str
    where: str
    found: str
    level: Level = "ok"
    way_out: str = ""


# Of lines where no terminal sets it.
_LOG_WIDTH = 160

_COLOURS = {"ok": "green", "told": "yellow", "fault": "red"}


def print_findings(findings: list[Finding]) -> None:
    """A row for each, with its way out below it."""
    table = Table(box=None, pad_edge=False)
    for heading in ("", "check", "where", "found"):
        table.add_column(heading, overflow="fold")
    for one in findings:
        found = f"{one.found}\n-> {one.way_out}" if one.way_out else one.found
        # Text: what a node says may have brackets, which would be taken for a style.
        table.add_row(Text(one.level, _COLOURS[one.level]), one.check, one.where, Text(found))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _LOG_WIDTH
    Console(width=width).print(table)
