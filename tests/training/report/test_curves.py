"""Which curves are drawn, of which points, and how large a page of many steps is."""

import base64
import math
from dataclasses import replace
from json import JSONDecoder
from typing import Any

import numpy as np
import pytest
from histories import CONFIG, STEPS, history

from training.config import TrainConfig
from training.report.curves import Curve, curves, feature_curves, smoothed, thinned
from training.report.history import STAGES
from training.report.runs import render


def _traces(curve: Curve) -> list[dict[str, Any]]:
    """What Plotly is given to draw."""
    drawn = curve.plot[curve.plot.index("Plotly.newPlot") :]
    return JSONDecoder().raw_decode(drawn[drawn.index("[") :])[0]


def _numbers(trace: dict[str, Any]) -> list[float]:
    """The heights of its points, which Plotly gets as encoded float64."""
    return np.frombuffer(base64.b64decode(trace["y"]["bdata"]), trace["y"]["dtype"]).tolist()


def test_only_what_a_run_has_is_drawn() -> None:
    assert [curve.title for curve in curves({"run": history(STEPS)})] == [
        "Loss", "Learning rate", "Throughput",
    ]  # fmt: skip
    assert curves({"run": history([])}) == []
    assert feature_curves({"run": history(STEPS)}) == []
    measured = [*STEPS, {"step": 5, "epoch": 1, "effective_rank": 4.0}]
    assert [curve.title for curve in feature_curves({"run": history(measured)})] == ["Effective rank"]


def test_the_loss_of_features_that_are_all_alike_is_drawn_where_it_is_known() -> None:
    for loss, alike in (("nt-xent", [math.log(19)]), ("dcl", [math.log(18)]), ("nt-logistic", [])):
        config = TrainConfig(
            data=CONFIG.data,
            lanes=5,
            batch_size=10,
            simclr={"loss": loss},  # pyright: ignore[reportArgumentType]
        )
        drawn, *levels = _traces(curves({"run": history(STEPS, config)})[0])
        assert _numbers(drawn) == [line["loss"] for line in STEPS]
        assert [level["y"][0] for level in levels] == pytest.approx(alike)


def test_losses_that_cannot_be_compared_are_not_drawn_over_each_other() -> None:
    other = replace(CONFIG, temperature=0.5)
    loss, *others = curves({"one": history(STEPS), "two": history(STEPS, other)})
    assert (loss.title, loss.plot) == ("Loss", "")
    assert "temperatures or batch sizes cannot be compared" in loss.about
    assert all(len(_traces(curve)) == 2 for curve in others)
    assert curves({"one": history(STEPS), "two": history(STEPS, replace(CONFIG, seed=3))})[0].plot


def test_many_points_are_smoothed_by_their_neighbours_and_drawn_too() -> None:
    values = np.random.default_rng(0).normal(size=400)
    means = smoothed(values)
    assert means[0] == values[0]
    assert means[-1] == pytest.approx(values[-1])
    assert means[200] == pytest.approx(values[190:211].mean())
    np.testing.assert_allclose(smoothed(np.arange(400.0)), np.arange(400))
    noisy = [{**STEPS[0], "step": step + 1, "loss": value} for step, value in enumerate(values.tolist())]
    points, mean, _ = _traces(curves({"run": history(noisy)})[0])
    assert points["hoverinfo"] == "skip"
    assert _numbers(mean) == pytest.approx(means.tolist())


def test_a_curve_has_its_values_and_what_it_comes_to_by_chance_beside_it() -> None:
    steps = [{**line, "view_matching": 0.1 * line["step"]} for line in STEPS]
    drawn = curves({"run-7": history(steps, replace(CONFIG, batch_size=10))})
    (curve,) = (one for one in drawn if one.title == "View matching")
    matched, chance = _traces(curve)
    assert (matched["name"], chance["name"]) == ("run-7", "chance")
    # 10 images are 20 views, and each has 19 others.
    assert chance["y"] == pytest.approx([100 / 19] * 2)


def test_many_steps_are_drawn_as_means_of_equally_many() -> None:
    values = np.stack([np.arange(1001), 3.0 * np.arange(1001)], axis=1)
    rows, size = thinned(values, 100)
    assert size == 11
    assert len(rows) == 91
    np.testing.assert_allclose(rows[:, 1], 3 * rows[:, 0])
    np.testing.assert_allclose(rows[0], values[:11].mean(0))
    np.testing.assert_allclose(rows[-1], values[990:].mean(0))
    few, size = thinned(values[:5], 100)
    assert size == 1
    np.testing.assert_array_equal(few, values[:5])


def test_a_page_of_many_steps_is_small_enough_to_send() -> None:
    spent = {f"{stage}_seconds": 0.125 for stage in STAGES}
    steps = [{**STEPS[0], **spent, "view_matching": 0.5, "step": step} for step in range(1, 100_001)]
    content = render(history(steps), 0)
    assert "Means of 167 steps." in content
    assert len(content) < 7e6


def test_names_of_runs_cannot_leave_a_plots_code() -> None:
    name = "file:///runs/</script><script>alert(1)</script>"
    for curve in curves({name: history(STEPS), "other": history(STEPS)}):
        assert "alert(1)</script>" not in curve.plot
        assert _traces(curve)[0]["name"] == name
