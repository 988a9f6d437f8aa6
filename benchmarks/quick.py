"""The claims that can be measured in a few minutes, diptych beside its peers, in one table.

    python benchmarks/quick.py    # images that come with scikit-learn, or --photographs FOLDER --cifar FOLDER

Runs the other benchmarks one after the other with few images and rounds, and prints what they measured:
diptych's median and the peer's, their ratio (above 1 where diptych is better: faster, smaller, more accurate)
as the median, lowest and highest of the rounds, and the command for the whole benchmark. A part that fails
has a row that says so, and the exit code is 1. Ctrl-C ends the part that runs and prints the rows so far.
"""

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.comparison import Comparison, read_json, spread
from benchmarks.samples import write_photographs, write_small_images

_LIMIT_SECONDS = 900
_END_SECONDS = 10

# Where the output is no terminal, rows are not folded.
_WIDTH = 250

_LAST_LINES = 15


@dataclass(frozen=True)
class _Part:
    """A benchmark, and the arguments that keep it short."""

    name: str
    arguments: tuple[str, ...]

    @property
    def script(self) -> Path:
        return Path(__file__).with_name(f"{self.name}.py")

    @property
    def purpose(self) -> str:
        """The first line of its docstring."""
        return self.script.read_text().split("\n", 1)[0].strip('"')

    @property
    def whole_command(self) -> str:
        """The first command in its docstring."""
        found = re.search(r"^    (python .*?)(?: +#.*)?$", self.script.read_text(), re.MULTILINE)
        assert found, f"{self.script} shows no command"
        return found[1]


def _parts(photographs: str, small_images: str) -> list[_Part]:
    return [
        _Part(
            "views",
            ("--photographs", photographs, "--cifar", small_images, "--batches", "6", "--rounds", "3"),
        ),
        _Part("stream", (photographs, "--steps", "24")),
        _Part("loss", ("--pairs", "128", "4096", "--rounds", "3")),
        _Part("overhead", (small_images, "--encoder", "resnet8", "--steps", "30", "--rounds", "2")),
        _Part("learning", (small_images, "--epochs", "2", "--seeds", "2")),
        _Part("search", (small_images, "--seeds", "0", "--rounds", "1")),
        _Part("plan", ("--shards", "100000", "1000000", "--serving", "1024")),
    ]


def _run(part: _Part, scratch: Path) -> list[Comparison]:
    """Its comparisons. Prints its last lines and raises RuntimeError if it fails."""
    log, results = scratch / "log", scratch / "results.json"
    results.unlink(missing_ok=True)
    command = [sys.executable, str(part.script), *part.arguments, "--json", str(results)]
    with log.open("wb") as output:
        # In a group of its own, Ctrl-C reaches it through _end alone.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(_LIMIT_SECONDS)
            problem = f"failed: exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            problem = f"failed: took more than {_LIMIT_SECONDS} s"
        finally:
            _end(process)
    if problem:
        last = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        print(problem, *last, sep="\n    ", flush=True)
        raise RuntimeError(problem)
    return read_json(results)


def _end(process: subprocess.Popen) -> None:
    """End it as Ctrl-C would, or kill it and all that it started."""
    # The second SIGINT ends a run that is saving at once.
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)


def _table(found: dict[_Part, list[Comparison] | str]) -> Table:
    caption = "Ratios above 1: diptych is better. Few images and rounds; the commands on the right have more."
    table = Table(box=box.MARKDOWN, caption=caption, caption_justify="left", caption_style="")
    for heading in ("claim", "diptych", "peer", "ratio", "whole benchmark"):
        table.add_column(heading, overflow="fold")
    for part, results in found.items():
        command = part.whole_command
        if isinstance(results, str):
            table.add_row(part.name, results, "", "", command)
            continue
        for each in results:
            theirs = f"{each.peer}: {_shown(each.peer_values)} {each.unit}"
            ratio = spread(each.ratios, ",.2f")
            table.add_row(each.claim, f"{_shown(each.diptych_values)} {each.unit}", theirs, ratio, command)
            command = ""
    return table


def _shown(values: list[float]) -> str:
    median = statistics.median(values)
    return f"{median:,.0f}" if median >= 100 else f"{median:.3g}"


def _measure(
    arguments: argparse.Namespace, scratch: Path, found: dict[_Part, list[Comparison] | str]
) -> None:
    """Add the comparisons of each part, or why it failed, to `found`."""
    photographs, small_images = scratch / "photographs", scratch / "small"
    write_photographs(photographs, arguments.photographs)
    write_small_images(small_images, arguments.cifar)
    parts = [part for part in _parts(str(photographs), str(small_images)) if part.name in arguments.only]
    for number, part in enumerate(parts, 1):
        print(f"{number}/{len(parts)} {part.name}: {part.purpose}", end=" ", flush=True)
        began = time.perf_counter()
        try:
            found[part] = _run(part, scratch)
        except RuntimeError as error:
            found[part] = str(error)
        print(f"{time.perf_counter() - began:.0f} s", flush=True)


def main() -> None:
    """Measure and print."""
    names = [part.name for part in _parts("", "")]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--photographs", type=Path, help="folder of Parquet files with a column image")
    parser.add_argument("--cifar", type=Path, help="folder of CIFAR-10's Parquet files train-* and test-*")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of the parts")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    found: dict[_Part, list[Comparison] | str] = {}
    code = 0
    with tempfile.TemporaryDirectory() as scratch:
        try:
            _measure(arguments, Path(scratch), found)
        except KeyboardInterrupt:
            print("stopped", flush=True)
            code = 128 + signal.SIGINT
    if found:
        console = Console(width=None if sys.stdout.isatty() else _WIDTH, markup=False, highlight=False)
        console.print(_table(found))
    sys.exit(code or any(isinstance(results, str) for results in found.values()))


if __name__ == "__main__":
    main()
