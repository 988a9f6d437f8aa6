"""What a search's report says and draws."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.config import DataConfig
from training.certainty import with_margins
from training.config import EvaluationConfig, TrainConfig
from tuning.config import SearchConfig
from tuning.figures import pareto_front, progress
from tuning.report import saving, write_search_report
from tuning.trials import Result, State, Trial


def _trial(number: int, state: State, *results: tuple[int, float, float], cost: int = 1) -> Trial:
    values = {"temperature": 0.1 + 0.1 * number, "optimizer.name": "sgd" if number % 2 else "lars"}
    found = [Result(images, accuracy, accuracy, seconds) for images, accuracy, seconds in results]
    return Trial(number, values, values, f"trials/{number:016x}", cost, state, results=found)


def _search(output: Path) -> SearchConfig:
    return SearchConfig(
        train=TrainConfig(data=DataConfig(train="/images"), evaluation=EvaluationConfig(every_epochs=1)),
        space={"temperature": {"loguniform": [0.1, 1.0]}, "optimizer.name": {"choice": ["sgd", "lars"]}},
        output=str(output),
    )


TRIALS = [
    _trial(0, "finished", (100, 0.2, 5.0), (200, 0.4, 10.0), (400, 0.6, 30.0)),
    _trial(1, "stopped early", (100, 0.3, 7.0)),
    _trial(2, "stopped early", (100, 0.1, 40.0), (200, 0.2, 50.0)),
    _trial(3, "failed"),
]


def test_the_best_so_far_never_falls_and_counts_each_trials_images_once() -> None:
    assert progress(TRIALS) == [
        (5.0, 100, 0.2), (7.0, 200, 0.3), (10.0, 300, 0.4),
        (30.0, 500, 0.6), (40.0, 600, 0.6), (50.0, 700, 0.6),
    ]  # fmt: skip


def test_what_stopping_early_saves_is_a_share_of_whole_trials() -> None:
    # Three trials of 400 images would have been 1,200; they were 400, 100 and 200. One that failed is none.
    assert saving(TRIALS) == pytest.approx(1 - 700 / 1200)
    assert saving(TRIALS[1:]) == 0.0


def test_the_pareto_front_is_all_that_no_other_beats() -> None:
    generator = np.random.default_rng(0)
    trials = [
        _trial(number, "finished", (100, float(accuracy), 1.0), cost=int(cost))
        for number, (accuracy, cost) in enumerate(
            zip(generator.integers(0, 20, 60) / 20, generator.integers(1, 20, 60), strict=True)
        )
    ]
    front = {(trial.multiply_adds, trial.accuracy) for trial in pareto_front(trials)}
    places = {(trial.multiply_adds, trial.accuracy or 0.0) for trial in trials}
    beaten = {
        (cost, accuracy)
        for cost, accuracy in places
        for other, better in places
        if (other <= cost and better > accuracy) or (other < cost and better >= accuracy)
    }
    assert front == places - beaten


def test_a_page_tells_what_became_of_every_trial_and_escapes_what_it_shows(tmp_path: Path) -> None:
    search = _search(tmp_path)
    trials = [*TRIALS[:3], replace(TRIALS[3], error="<b>no memory</b>")]
    page = Path(write_search_report(search, trials)).read_text()
    body = page[page.index("<tbody>") : page.index("</tbody>")]
    rows = [re.findall("<td[^>]*>([^<]*)", row) for row in body.split("</tr>")[:-1]]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert [row[5] for row in rows] == [
        "finished", "stopped early", "stopped early", "failed: &lt;b&gt;no memory&lt;/b&gt;",
    ]  # fmt: skip
    assert [row[1] for row in rows] == ["0.6", "0.3", "0.2", ""]
    assert html.unescape(rows[3][5]) == "failed: <b>no memory</b>"
    assert "<b>no memory" not in page
    # One cost for all: no picture of it.
    pictures = sorted(path.name for path in (tmp_path / "search" / "report").iterdir())
    assert pictures == ["best-so-far.png", "keys.png", "parallel.png", "trials.png"]


def test_pictures_can_be_drawn_of_one_trial_and_one_evaluation(tmp_path: Path) -> None:
    write_search_report(_search(tmp_path), TRIALS[1:2])
    for path in (tmp_path / "search" / "report").iterdir():
        assert np.asarray(Image.open(path).convert("L")).std() > 1, f"{path} is blank"


def test_the_page_says_how_sure_the_best_accuracy_is(tmp_path: Path) -> None:
    search = _search(tmp_path)
    line = {"step": 4, "evaluated_images": 60, "majority_share": 0.1, "chance": 0.1, "bank_images": 540}
    line |= with_margins({"knn_top1": 0.6}, 60) | {"neighbours": 18, "trained_on_images": 0}
    _write_metrics(tmp_path / search.name / TRIALS[0].run / "metrics.jsonl", line)
    page = Path(write_search_report(search, TRIALS)).read_text()
    assert "<b>60.0% ± 12.6</b><span>best accuracy</span>" in page
    assert "<b>60</b><span>images evaluated</span>" in page


def _write_metrics(file: Path, line: dict[str, float]) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(line) + "\n")
