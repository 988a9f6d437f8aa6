"""A search's trials on the terminal."""

import io

import pytest
from rich.console import Console

from cluster.tables import LiveTrials, trial_table
from tuning.trials import Result, Trial


def _trials() -> list[Trial]:
    values = [{"temperature": 0.123456, "batch_size": 64}, {"temperature": 0.5}, {"temperature": 0.7}]
    trials = [Trial(n, value, value, f"trials/{n}", 5) for n, value in enumerate(values)]
    trials[0].add(Result(6400, 0.3125, 0.3, 7.0))
    trials[0].state = "finished"
    trials[2].state, trials[2].error = "failed", "out of memory"
    return trials


def test_a_row_tells_of_each_trial() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(trial_table(_trials(), 8))
    out = console.file
    assert isinstance(out, io.StringIO)
    title, heads, *rows = (line.split() for line in out.getvalue().splitlines())
    assert " ".join(title) == "2 of 8 trials have ended"
    assert heads == ["trial", "accuracy", "score", "images", "state", "temperature", "batch_size"]
    assert rows[0] == ["0", "31.2%", "0.300", "6,400", "finished", "0.123", "64"]
    assert rows[1] == ["1", "0", "running", "0.5"]
    assert rows[2] == ["2", "0", "failed", "0.7"]


def test_without_a_terminal_each_evaluation_and_fault_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trials = _trials()
    with LiveTrials(8) as table:
        table.show(trials)
        table.show(trials)
        trials[0].add(Result(12800, 0.5, 0.5, 9.0))
        table.show(trials)
    assert capsys.readouterr().err.splitlines() == [
        "trial 0: 31.2% after 6,400 images (temperature=0.123, batch_size=64)",
        "trial 2: failed: out of memory after 0 images (temperature=0.7)",
        "trial 0: 50.0% after 12,800 images (temperature=0.123, batch_size=64)",
    ]
