"""A search's report: its words and its figures."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest

from pipelines.config import DataConfig
from training.config import EvaluationConfig, TrainConfig
from training.evaluation.certainty import with_margins
from tuning.config import SearchConfig
from tuning.figures import progress, sections
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


def _figures(search: SearchConfig, trials: list[Trial]) -> dict[str, go.Figure]:
    found = sections(search.distributions, trials)
    return {name: figure for section in found for name, figure in section.figures.items()}


def test_the_pareto_front_is_all_that_no_other_beats(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    trials = [
        _trial(number, "finished", (100, float(accuracy), 1.0), cost=int(cost))
        for number, (accuracy, cost) in enumerate(
            zip(generator.integers(1, 20, 60) / 20, generator.integers(1, 20, 60) * 1_000_000, strict=True)
        )
    ]
    others, front = _figures(_search(tmp_path), trials)["cost"].data
    places = {(trial.multiply_adds / 1e6, trial.accuracy or 0.0) for trial in trials}
    beaten = {
        (cost, accuracy)
        for cost, accuracy in places
        for other, better in places
        if (other <= cost and better > accuracy) or (other < cost and better >= accuracy)
    }
    assert set(zip(front.x, front.y, strict=True)) == places - beaten
    assert set(zip(others.x, others.y, strict=True)) == beaten
    assert front.marker.color != others.marker.color


def test_a_curve_has_each_evaluation_of_a_trial_and_a_cross_where_it_was_stopped(tmp_path: Path) -> None:
    curves = _figures(_search(tmp_path), TRIALS)["trials"].data
    for curve, trial in zip(curves, TRIALS[:3], strict=True):
        assert curve.name == f"trial {trial.number}"
        assert list(zip(curve.x, curve.y, strict=True)) == [(r.images, r.accuracy) for r in trial.results]
        assert (curve.marker.symbol[-1] == "x") == (trial.state == "stopped early")
    best, *others = (curve.line.color for curve in curves)
    assert best not in others


def test_each_key_is_drawn_against_the_accuracy_of_the_trials_that_have_one(tmp_path: Path) -> None:
    figures = _figures(_search(tmp_path), TRIALS)
    for key in ("temperature", "optimizer.name"):
        (points,) = figures[f"key-{key}"].data
        found = {(str(x).strip("'"), y, symbol) for x, y, symbol in
                 zip(points.x, points.y, points.marker.symbol, strict=True)}  # fmt: skip
        assert found == {
            (str(trial.values[key]), trial.accuracy, "x" if trial.state == "stopped early" else "circle")
            for trial in TRIALS[:3]
        }
    assert figures["key-temperature"].layout.xaxis.type == "log"


def test_a_line_for_each_trial_is_brighter_the_better_it_is(tmp_path: Path) -> None:
    lines = list(_figures(_search(tmp_path), TRIALS)["parallel"].select_traces({"mode": "lines"}))
    # Accuracies of 0.6, 0.3 and 0.2, from 0 at the lowest to 1 at the highest.
    assert sorted(line.y[0] for line in lines) == pytest.approx([0, 0.25, 1])
    greens = [int(line.line.color.split(",")[1]) for line in sorted(lines, key=lambda line: line.y[0])]
    assert greens == sorted(set(greens))


def test_lists_and_conditional_keys_and_coefficients_are_drawn(tmp_path: Path) -> None:
    space = {
        "data.view.crop_scale": {"choice": [[0.2, 1.0], [0.5, 1.0]]},
        "optimizer.name": {"choice": ["sgd", "lars"]},
        "optimizer.nesterov": {"choice": [True, False], "when": {"optimizer.name": "sgd"}},
        "seed": {"integers": [4, 8]},
    }
    search = replace(_search(tmp_path), space=space)
    values: list[dict[str, object]] = [
        {"data.view.crop_scale": [0.2, 1.0], "optimizer.name": "sgd", "optimizer.nesterov": True, "seed": 4},
        {"data.view.crop_scale": [0.5, 1.0], "optimizer.name": "lars", "seed": 7},
    ]
    values = [value | {"encoder.alpha": 1.1 + number} for number, value in enumerate(values)]
    trials = [replace(trial, values=value) for trial, value in zip(TRIALS, values, strict=False)]
    figures = _figures(search, trials)
    (crops,) = figures["key-data.view.crop_scale"].data
    assert {str(x).strip("'") for x in crops.x} == {"[0.2, 1.0]", "[0.5, 1.0]"}
    assert figures["key-data.view.crop_scale"].layout.xaxis.ticktext == ("[0.2, 1.0]", "[0.5, 1.0]")
    assert list(figures["key-optimizer.nesterov"].data[0].y) == [0.6]
    assert sorted(figures["key-seed"].data[0].x) == [4, 7]
    assert sorted(figures["key-encoder.alpha"].data[0].x) == [1.1, 2.1]


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
    # All trials cost the same: there is no figure of that.
    assert re.findall('id="figure-([^"]*)"', page) == [
        "best-over-minutes", "best-over-images", "trials", "key-temperature", "key-optimizer.name",
        "parallel",
    ]  # fmt: skip
    assert Path(write_search_report(search, trials)).read_text() == page


def test_figures_of_one_trial_and_one_evaluation_and_none_without_an_evaluation(tmp_path: Path) -> None:
    search = _search(tmp_path)
    assert [(*figure.data[0].x,) for figure in _figures(search, TRIALS[1:2]).values()][2] == (100,)
    assert _figures(search, TRIALS[3:]) == {}
    page = Path(write_search_report(search, TRIALS[3:])).read_text()
    assert "figure-" not in page
    assert page.count("<tr>") == 2


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
