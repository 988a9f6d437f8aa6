"""The curves of one run, or of several over each other, as Plotly figures."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from training.config import TrainConfig
from training.losses.matching import chance
from training.metrics_table import Metrics
from training.report.history import STAGES, RunHistory, collapsed_loss
from training.report.page import COLOURS, GREY, plot_html, styled

# Most points of a curve, and most points of the area plot of stages.
_CURVE_POINTS, _STAGE_POINTS = 600, 60

# Characters of a line of a run's name beside its bar: a phone has room for few.
_LABEL_WIDTH = 16

# Curves with fewer points show them as markers; those with more are smoothed over this share of them.
_FEW_POINTS, _SMOOTHED_SHARE = 30, 1 / 20


@dataclass(frozen=True)
class Curve:
    """A drawn curve. plot: HTML, empty if there is nothing to draw. legend: (colour, text) below it."""

    title: str
    about: str
    plot: str
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _Metric:
    """A key of metrics.jsonl that is drawn.

    scale: factor of its values. every_step: each step has one, of its own batch, so that it is smoothed.
    measured: keys of its first line that have levels to compare it with, and their names. level: a function
    of the config that gives another one, or None, and its name. They are drawn dashed.
    """

    key: str
    title: str
    about: str = ""
    axis: str = ""
    scale: float = 1.0
    every_step: bool = False
    measured: Mapping[str, str] = field(default_factory=dict)
    level: tuple[str, Callable[[TrainConfig], float | None]] | None = None


_METRICS = (
    _Metric(
        "loss", "Loss", "Of each step's batch; dashed: of features that are all alike.", every_step=True,
        level=("all features alike", collapsed_loss),
    ),
    _Metric(
        "view_matching", "View matching",
        "Views whose nearest other view in the batch is their partner; dashed: by chance.",
        "%", 100, every_step=True, level=("chance", lambda config: chance(config.batch_size)),
    ),
    _Metric(
        "knn_top1", "kNN accuracy",
        "Of images that are not trained on; dashed: of their raw pixels, and the largest class's share.",
        "top-1, %", 100, measured={"knn_top1_pixels": "raw pixels", "majority_share": "the largest class"},
    ),
    _Metric("linear_top1", "Linear probe", "Of images that are not trained on.", "top-1, %", 100),
    _Metric("top1", "Classifier", "Of images that are not trained on.", "top-1, %", 100),
    _Metric("learning_rate", "Learning rate", "Of each step."),
    _Metric("images_per_second", "Throughput", "Images per second, over all workers.", every_step=True),
)  # fmt: skip

_WITHOUT_LABELS = (
    _Metric("alignment", "Alignment", "Squared distance of an image's two views: less is better."),
    _Metric("uniformity", "Uniformity", "How evenly the features spread: less is better."),
    _Metric("effective_rank", "Effective rank", "Directions that the features fill: 1 is a collapse."),
)

_STAGE_TITLES = {"data_wait": "waiting for data", "optimizer": "optimiser"}


def curves(runs: Mapping[str, RunHistory]) -> list[Curve]:
    """A curve for each metric that any of the runs, by name, has; then where the time went."""
    drawn = _drawn(_METRICS, runs)
    if timed := {name: run for name, run in runs.items() if run.stage_seconds()}:
        drawn.append(_stages(timed))
    return drawn


def feature_curves(runs: Mapping[str, RunHistory]) -> list[Curve]:
    """The curves of what is measured of features without labels."""
    return _drawn(_WITHOUT_LABELS, runs)


def run_colours(runs: Mapping[str, RunHistory]) -> list[tuple[str, str]]:
    """Pairs of a colour and the name of the run that has it."""
    return [(COLOURS[number % len(COLOURS)], name) for number, name in enumerate(runs)]


def thinned(
    values: Float[np.ndarray, "n columns"], most: int
) -> tuple[Float[np.ndarray, "parts columns"], int]:
    """Means of equally many rows each, at most `most` of them, and of how many rows."""
    size = max(1, -(-len(values) // most))
    starts = np.arange(0, len(values), size)
    counts = np.diff(np.append(starts, len(values)))
    return np.add.reduceat(values, starts) / counts[:, None], size


def smoothed(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Mean of each value and of its neighbours on both sides; at the ends, of fewer on both sides."""
    reach = np.arange(len(values))
    reach = np.minimum(np.minimum(reach, reach[::-1]), int(_SMOOTHED_SHARE * len(values) / 2))
    sums = np.cumsum(np.append(0.0, values))
    places = np.arange(len(values))
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def _drawn(metrics: Iterable[_Metric], runs: Mapping[str, RunHistory]) -> list[Curve]:
    return [
        _curve(metric, runs) for metric in metrics if any(run.lines_with(metric.key) for run in runs.values())
    ]


def _loss_of(config: TrainConfig) -> tuple[object, ...]:
    """Settings that two runs must share for their losses to be compared."""
    return config.objective, config.simclr, config.temperature, config.batch_size, config.byol.views_apart


def _curve(metric: _Metric, runs: Mapping[str, RunHistory]) -> Curve:
    if metric.key == "loss" and len({_loss_of(run.config) for run in runs.values()}) > 1:
        about = "Not drawn: losses of other objectives, temperatures or batch sizes cannot be compared."
        return Curve(metric.title, about, "")
    figure, steps_per_point = go.Figure(), 1
    for (colour, name), run in zip(run_colours(runs), runs.values(), strict=True):
        if lines := run.lines_with(metric.key):
            dashed = colour if len(runs) > 1 else GREY
            size = _add_run(figure, metric, run, lines, name, colour, dashed)
            steps_per_point = max(steps_per_point, size)
    if metric.scale == 100 or metric.key in ("images_per_second", "learning_rate"):
        figure.update_yaxes(rangemode="tozero")
    about = metric.about + (f" Means of {steps_per_point:,} steps." if steps_per_point > 1 else "")
    figure.update_yaxes(hoverformat=".4~g")
    plot = plot_html(styled(figure, "step", metric.axis), f"curve-{metric.key}")
    return Curve(metric.title, about, plot)


def _add_run(
    figure: go.Figure,
    metric: _Metric,
    run: RunHistory,
    lines: Metrics,
    name: str,
    colour: str,
    dashed: str,
) -> int:
    """Draw a run's curve and its baselines; returns the number of lines that a point is the mean of."""
    rows = np.column_stack((lines.column("step"), metric.scale * lines.column(metric.key)))
    rows, size = thinned(rows, _CURVE_POINTS)
    steps, values = rows.T
    mode = "lines+markers" if len(rows) < _FEW_POINTS else "lines"
    if metric.every_step and mode == "lines":
        figure.add_scatter(
            x=steps, y=values, mode=mode, name=name, opacity=0.35, hoverinfo="skip",
            line={"color": colour, "width": 1},
        )  # fmt: skip
        values = smoothed(values)
    figure.add_scatter(x=steps, y=values, mode=mode, name=name, line={"color": colour, "width": 1.75})
    for label, level in _baselines(metric, run, lines[0]).items():
        figure.add_scatter(
            x=steps[[0, -1]], y=[metric.scale * level] * 2, mode="lines", name=label,
            line={"color": dashed, "dash": "dash", "width": 1.25},
        )  # fmt: skip
    return size


def _baselines(metric: _Metric, run: RunHistory, first: Mapping[str, Any]) -> dict[str, float]:
    """Levels to compare a curve with, by name; `first` is the first line that has the metric."""
    levels = {name: first[key] for key, name in metric.measured.items() if key in first}
    if metric.level:
        name, of = metric.level
        if (level := of(run.config)) is not None:
            levels[name] = level
    return levels


def _stages(runs: Mapping[str, RunHistory]) -> Curve:
    """Where the time of the steps went: over one run's steps, or in all of each of several runs."""
    totals = [run.stage_seconds() for run in runs.values()]
    if len(runs) > 1:
        figure = styled(_stage_bars(list(runs), totals), "% of the time", "")
        legend = [(colour, _stage_title(stage)) for stage, colour in zip(STAGES, COLOURS, strict=False)]
    else:
        figure = styled(_stage_area(next(iter(runs.values()))), "step", "% of the time")
        whole = sum(totals[0].values())
        legend = [
            (colour, f"{_stage_title(stage)} {totals[0][stage] / whole:.0%}")
            for stage, colour in zip(STAGES, COLOURS, strict=False)
        ]
    about = "Wall-clock time of rank 0."
    return Curve("Where the time went", about, plot_html(figure, "curve-stages"), tuple(legend))


def _stage_bars(names: list[str], totals: list[dict[str, float]]) -> go.Figure:
    figure = go.Figure()
    names = ["<br>".join(wrap(name, _LABEL_WIDTH)) for name in names]
    for stage, colour in zip(STAGES, COLOURS, strict=False):
        shares = [100 * seconds[stage] / sum(seconds.values()) for seconds in totals]
        figure.add_bar(x=shares, y=names, orientation="h", name=_stage_title(stage), marker={"color": colour})
    figure.update_layout(barmode="stack")
    return figure.update_yaxes(autorange="reversed", automargin=True)


def _stage_area(run: RunHistory) -> go.Figure:
    keys = [f"{stage}_seconds" for stage in STAGES]
    steps = run.steps
    rows = np.column_stack([steps.column("step"), *(np.nan_to_num(steps.column(key)) for key in keys)])
    rows, _ = thinned(rows, _STAGE_POINTS)
    shares = 100 * rows[:, 1:] / np.maximum(rows[:, 1:].sum(1, keepdims=True), 1e-12)
    figure = go.Figure()
    for stage, colour, share in zip(STAGES, COLOURS, shares.T, strict=False):
        figure.add_scatter(
            x=rows[:, 0], y=share, mode="lines", name=_stage_title(stage), stackgroup="all",
            line={"color": colour, "width": 0}, fillcolor=colour,
        )  # fmt: skip
    return figure.update_yaxes(range=[0, 100])


def _stage_title(stage: str) -> str:
    return _STAGE_TITLES.get(stage, stage)
