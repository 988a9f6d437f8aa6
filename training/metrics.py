"""A run's metrics.jsonl: one JSON object a line, each step once."""

from typing import Any

from pipelines import storage
from pipelines.json_lines import encode_lines, read_lines

_FILE = "metrics.jsonl"


class MetricsLog:
    """The lines of RUN/metrics.jsonl, written whole at each flush: object storage cannot append."""

    def __init__(self, run: str, resume_step: int) -> None:
        """Goes on from the lines that an earlier part of the run left up to `resume_step`."""
        self._uri = storage.join(run, _FILE)
        self._lines = (
            [line for line in read_metrics(run) if line["step"] <= resume_step] if resume_step else []
        )
        self._unsaved = False

    def count(self, key: str) -> int:
        """Lines that have `key`."""
        return sum(key in line for line in self._lines)

    @property
    def last_step(self) -> int | None:
        """Step of the last line, None where there is none."""
        return self._lines[-1]["step"] if self._lines else None

    def append(self, **values: Any) -> None:
        self._lines.append(values)
        self._unsaved = True

    def flush(self) -> None:
        if self._unsaved:
            storage.write(self._uri, encode_lines(self._lines))
            self._unsaved = False


def read_metrics(run: str) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl, none where there is no such file; ValueError where one is damaged."""
    return read_lines(storage.join(run, _FILE))
