"""The numbers and words of a report."""

from dataclasses import replace
from typing import Any

import pytest
from histories import AFTER, BEFORE, CONFIG, STEPS, history

from training.evaluation.certainty import with_margins
from training.report.summary import differing_rows, measurements, settings, summary_rows


def _measured(*lines: dict[str, Any]) -> dict[str, str]:
    return dict(measurements(history(lines)))


def test_accuracies_are_shown_as_percentages() -> None:
    facts = _measured(BEFORE, *STEPS, AFTER)
    assert facts["kNN, raw pixels"] == "25.0%"
    assert facts["kNN, untrained"] == "30.1%"
    assert facts["kNN, trained"] == "81.2%"


def test_accuracies_are_shown_with_their_margin_and_baselines() -> None:
    compared = {
        "evaluated_images": 172, "majority_share": 0.35, "chance": 1 / 3, "bank_images": 1500,
        "neighbours": 12, "trained_on_images": 4,
    }  # fmt: skip
    line = {"step": 5, "epoch": 1, **with_margins({"knn_top1": 0.35}, 172), **compared}
    facts = _measured(*STEPS, line)
    assert facts["kNN, trained"] == "35.0% ± 7.4"
    assert (facts["images evaluated"], facts["largest class"], facts["chance"]) == ("172", "35.0%", "33.3%")
    assert (facts["training images compared with"], facts["neighbours"]) == ("1,500", "12")
    assert facts["evaluated and trained on"] == "4"


def test_the_last_step_and_the_median_speed_are_shown() -> None:
    facts = _measured(*STEPS)
    assert facts["steps"] == "5"
    assert facts["epochs"] == "1 of 100"
    assert facts["last loss"] == "3.500"
    assert facts["images/s, median"] == "3,000"


@pytest.mark.parametrize(
    ("speeds", "shown"),
    [
        # 256 images a step; the first at 1,000 to 5,000 a second, the last in 5 times 85 minutes.
        ([1000.0, 2000.0, 3000.0, 4000.0, 5000.0], "1 s"),
        ([1.0], "4 min"),
        ([0.05] * 5, "7.1 h"),
    ],
)
def test_the_time_in_steps_is_their_images_by_their_speed(speeds: list[float], shown: str) -> None:
    lines = [{**line, "images_per_second": speed} for line, speed in zip(STEPS, speeds, strict=False)]
    assert _measured(*lines)["time in steps"] == shown


def test_faults_are_counted_and_not_mentioned_if_there_are_none() -> None:
    faults = [
        {"step": 2, "epoch": 1, "skipped": 1},
        {"step": 3, "epoch": 1, "skipped": 2},
        {"step": 3, "epoch": 1, "rolled_back_to": 1},
        {"step": 3, "epoch": 1, "quarantined": 1234},
    ]
    facts = _measured(*STEPS[:1], *faults, *STEPS[3:])
    assert facts["steps skipped"] == "2"
    assert facts["rollbacks"] == "1"
    assert facts["images quarantined"] == "1,234"
    assert not {"steps skipped", "rollbacks", "images quarantined"} & set(_measured(*STEPS))


def test_a_resumed_run_says_on_how_many_workers() -> None:
    lines = [{"step": 0, "epoch": 0, "workers": 4}, {"step": 20, "epoch": 1, "workers": 4}]
    assert dict(settings(history(lines)))["workers"] == "4"
    assert _measured(*lines)["resumes"] == "1"
    assert "resumes" not in _measured(*lines[:1])
    fewer = history([*lines, {"step": 40, "epoch": 2, "workers": 1}])
    assert dict(settings(fewer))["workers"] == "4, then 1"


def test_view_matching_is_shown_beside_its_chance() -> None:
    steps = [{**line, "view_matching": 0.1 * line["step"]} for line in STEPS]
    # 10 images are 20 views, and each has 19 others.
    facts = dict(measurements(history(steps, replace(CONFIG, batch_size=10))))
    assert (facts["views matched"], facts["views matched by chance"]) == ("30.0%", "5.3%")
    assert "views matched" not in _measured(*STEPS)


def test_runs_stand_side_by_side_and_only_their_differing_settings_are_listed() -> None:
    runs = {
        "one": history(STEPS),
        "two": history(STEPS[:2], replace(CONFIG, name="other", batch_size=512)),
    }
    assert differing_rows(runs) == [["batch_size", "256", "512"]]
    rows = {label: values for label, *values in summary_rows(runs)}
    assert rows["last loss"] == ["3.500", "5.000"]
    assert rows["steps"] == ["5", "2"]
