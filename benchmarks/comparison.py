"""Measurements of diptych beside those of a peer in the same run, and their JSON files."""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipelines import storage


@dataclass(frozen=True)
class Comparison:
    """Values of diptych and of a peer, or of diptych under other conditions; one of each a round."""

    claim: str
    peer: str
    unit: str
    diptych_values: list[float]
    peer_values: list[float]
    more_is_better: bool = field(default=False, kw_only=True)

    @property
    def ratios(self) -> list[float]:
        """How many times better diptych was, round by round."""
        pairs = list(zip(self.diptych_values, self.peer_values, strict=True))
        return [mine / theirs if self.more_is_better else theirs / mine for mine, theirs in pairs]


def spread(values: Sequence[float], form: str) -> str:
    """The median of the values; of several also the lowest and the highest."""
    median = f"{statistics.median(values):{form}}"
    return f"{median} ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else median


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Let the user ask for the comparisons as a file."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparisons there as well")


def write_json(path: Path | None, comparisons: Sequence[Comparison]) -> None:
    """Write them, the whole file or none of it; does nothing without a path."""
    if path:
        storage.write(str(path.absolute()), json.dumps([asdict(each) for each in comparisons]).encode())


def read_json(path: Path) -> list[Comparison]:
    """The comparisons that `write_json` wrote."""
    return [Comparison(**fields) for fields in json.loads(path.read_bytes())]
