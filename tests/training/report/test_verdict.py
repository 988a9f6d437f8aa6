"""The verdict on a run: what it says of runs that learned, did not, or collapsed, and what comes next."""

import math
import shlex
from dataclasses import replace
from typing import Any

import pytest
from histories import CONFIG, history

from cluster.cli.main import app
from pipelines.config import DataConfig
from training.config import EvaluationConfig, TrainConfig
from training.report.verdict import Verdict, verdict

RUN = TrainConfig(data=DataConfig(train="/photos of mine"), batch_size=64, output="/my runs", name="first")


def _steps(count: int, *, loss: float = 2.0, first: float = 0.1, last: float = 0.1) -> list[dict[str, Any]]:
    """Lines of steps whose view matching goes from `first` to `last`."""
    return [
        {
            "step": step,
            "epoch": 100,
            "loss": loss,
            "images_per_second": 100.0,
            "data_wait_seconds": 0.1,
            "forward_seconds": 0.4,
            "view_matching": first + (last - first) * step / count,
        }
        for step in range(1, count + 1)
    ]


def _judged(*lines: dict[str, Any], config: TrainConfig = RUN) -> Verdict:
    return verdict(history(lines, config))


def _accuracies(before: float, after: float, margin: float) -> tuple[dict[str, Any], dict[str, Any]]:
    first = {"step": 0, "epoch": 0, "knn_top1": before, "knn_top1_pixels": 0.2}
    return first, {
        "step": 2000, "epoch": 100, "knn_top1": after, "knn_top1_margin": margin, "majority_share": 0.25,
        "evaluated_images": 500,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("after", "learned"),
    # The largest class has 25 %, the untrained encoder 22 %.
    [(0.40, True), (0.29, True), (0.27, False), (0.10, False)],
)
def test_accuracy_must_exceed_what_needs_no_learning_by_its_margin(after: float, learned: bool) -> None:
    before, line = _accuracies(0.22, after, margin=0.035)
    found = _judged(before, *_steps(2000, last=0.9), line)
    assert found.learned is learned
    assert found.evidence[0] == (
        f"kNN accuracy {after:.1%} ± 3.5 (the untrained encoder 22.0%, the largest class 25.0%, "
        "raw pixels 20.0%)"
    )


def test_without_labels_view_matching_decides() -> None:
    assert _judged(*_steps(2000, first=0.1, last=0.8)).learned is True
    assert _judged(*_steps(2000, first=0.1, last=0.1)).learned is False
    assert _judged(*_steps(2000, first=0.0, last=0.01)).learned is False  # Chance is 1 in 127.


def test_few_steps_do_not_tell() -> None:
    assert _judged().learned is None
    found = _judged(*_steps(20, last=0.9))
    assert (found.title, found.evidence, found.reasons) == ("Too early to tell", (), ())


def test_a_collapsed_run_is_told_by_its_rank_or_its_loss() -> None:
    rank = {"step": 2000, "epoch": 100, "effective_rank": 1.01}
    assert "collapsed to a point" in _judged(*_steps(2000), rank).reasons[0]
    alike = math.log(2 * 64 - 1)
    assert f"stayed at {alike:.2f}" in _judged(*_steps(2000, loss=1.001 * alike)).reasons[0]
    assert "ln(2N" not in _judged(*_steps(2000, loss=0.9 * alike)).reasons[0]
    triplets = replace(RUN, simclr=replace(RUN.simclr, loss="margin"))
    assert "ln(2N" not in _judged(*_steps(2000, loss=alike), config=triplets).reasons[0]


def test_few_steps_and_waiting_are_reasons() -> None:
    found = _judged(*({**line, "data_wait_seconds": 4.0} for line in _steps(200)))
    assert found.reasons[0].startswith("200 steps are few")
    assert found.reasons[1].startswith("91% of the time went into waiting for images")


@pytest.mark.parametrize("config", [RUN, replace(RUN, evaluation=EvaluationConfig(held_out=0.1)), CONFIG])
@pytest.mark.parametrize("epoch", [1, 100])
def test_the_commands_that_come_next_are_understood(config: TrainConfig, epoch: int) -> None:
    commands = _judged({**_steps(1)[0], "epoch": epoch}, config=config).next
    assert any("--resume" in command for command in commands) is (epoch < 100)
    assert len(commands) == (4 if epoch < 100 else 3)
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "diptych"
        if "--resume" not in words:  # That reads the run.
            app.parse_args(words, exit_on_error=False, print_error=False)


def test_a_verdict_in_words() -> None:
    before, line = _accuracies(0.22, 0.10, margin=0.035)
    lines = str(_judged(before, *_steps(200), line)).splitlines()
    assert lines[0].startswith("Not learned (yet): kNN accuracy 10.0% ± 3.5 (the untrained encoder 22.0%")
    assert lines[1].startswith("  likely because 200 steps are few")
    assert lines[3:5] == ["next:", "  diptych eval '/my runs/first' --protocol linear --test LABELLED_IMAGES"]
