"""`diptych report`: the page of a run, or of several."""

from collections.abc import Sequence

from training.report import write_reports


def run_report(runs: Sequence[str], output: str | None) -> None:
    """Write the page and say where it is; raises ValueError as write_reports does."""
    print(write_reports(runs, output))
