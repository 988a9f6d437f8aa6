"""The curves of one run, or of several over each other."""

import html
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.offline import get_plotlyjs

from training.config import TrainConfig
from training.losses.matching import chance
from training.report_run import STAGES, RunRecord

# Readable on a light page and on a dark one.
_GREY = "#8a919e"
COLOURS = (
    "#3b82c4", "#d9822b", "#3a9e6b", "#c9504c", "#8f6fc9", "#a07a55", "#d46fae", "#7f8794", "#a8a134",
    "#2fa5b5",
)  # fmt: skip

# Points of a curve that are drawn, and parts of a run whose time is drawn.
_POINTS, _PARTS = 600, 60

# Curves of so few points show them.
_FEW = 30

# A finger that scrolls the page shall not zoom a curve.
STYLE = """
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr));
  gap: 1.75rem 1.5rem; margin-top: 1rem; }
figure { margin: 0; min-width: 0; } figure p.soft { font-size: .85rem; margin: 0 0 .25rem; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .85rem; color: var(--soft);
  margin: .5rem 0; }
.names { position: sticky; top: 0; background: var(--paper); z-index: 1; padding: .25rem 0; }
.legend i { display: inline-block; width: .75rem; height: .75rem; border-radius: .2rem; margin-right: .4rem; }
"""

_SCRIPT = """<script>if (matchMedia("(pointer: coarse)").matches)
  document.querySelectorAll(".plotly-graph-div").forEach(plot => Plotly.relayout(plot,
    {dragmode: false, "xaxis.fixedrange": true, "yaxis.fixedrange": true}));</script>"""


@dataclass(frozen=True)
class _Curve:
    key: str
    title: str
    about: str = ""
    axis: str = ""
    scale: float = 1.0
    flat: str = ""  # What the first of its lines may have beside it, to be compared with.
    chance: Callable[[TrainConfig], float] | None = None  # What it comes to by chance.


_CURVES = (
    _Curve("loss", "Loss", "Of each step's batch."),
    _Curve(
        "view_matching", "View matching",
        "Views whose nearest other view in the batch is their partner; dashed: by chance.",
        "%", 100, chance=lambda config: chance(config.batch_size),
    ),
    _Curve(
        "knn_top1", "kNN accuracy", "Of images that are not trained on; dashed: of their raw pixels.",
        "top-1, %", 100, "knn_top1_pixels",
    ),
    _Curve("linear_top1", "Linear probe", "Of images that are not trained on.", "top-1, %", 100),
    _Curve("top1", "Classifier", "Of images that are not trained on.", "top-1, %", 100),
    _Curve("alignment", "Alignment", "Squared distance of an image's two views: less is better."),
    _Curve("uniformity", "Uniformity", "How evenly the features spread: less is better."),
    _Curve("effective_rank", "Effective rank", "Directions that the features fill: 1 is a collapse."),
    _Curve("learning_rate", "Learning rate", "Of each step."),
    _Curve("images_per_second", "Throughput", "Images a second, over all workers."),
)  # fmt: skip


def curves(runs: Mapping[str, RunRecord]) -> str:
    """All that the runs have to draw, as HTML with the drawing code; each run has a colour of its own."""
    figures = [
        _drawn(curve, runs) for curve in _CURVES if any(run.having(curve.key) for run in runs.values())
    ]
    if times := {name: run for name, run in runs.items() if run.stage_seconds()}:
        figures.append(_times(times))
    if not figures:
        return '<p class="note">No step is written down yet.</p>'
    names = f'<div class="names">{legend(_names(runs))}</div>' if len(runs) > 1 else ""
    code = f"<script>{get_plotlyjs()}</script>"
    return f'{code}{names}<div class="curves">{"".join(figures)}</div>{_SCRIPT}'


def legend(entries: Iterable[tuple[str, str]], *, pressed: bool = False) -> str:
    """Which colour is what, as HTML; `pressed`: of entries that one can choose."""
    open, close = (
        ('<button type="button" aria-pressed="false">', "</button>") if pressed else ("<span>", "</span>")
    )
    shown = (
        f'{open}<i style="background:{colour}"></i>{html.escape(text)}{close}' for colour, text in entries
    )
    return f'<div class="legend">{"".join(shown)}</div>'


def thinned(
    values: Float[np.ndarray, "n columns"], most: int
) -> tuple[Float[np.ndarray, "parts columns"], int]:
    """Means of equally many rows each, at most `most` of them, and of how many rows."""
    size = max(1, -(-len(values) // most))
    starts = np.arange(0, len(values), size)
    counts = np.diff(np.append(starts, len(values)))
    return np.add.reduceat(values, starts) / counts[:, None], size


def _drawn(curve: _Curve, runs: Mapping[str, RunRecord]) -> str:
    figure, coarsest = go.Figure(), 1
    for name, run in runs.items():
        if not (lines := run.having(curve.key)):
            continue
        colour = _colours(runs)[name]
        rows = np.array([(line["step"], curve.scale * line[curve.key]) for line in lines], float)
        rows, size = thinned(rows, _POINTS)
        coarsest = max(coarsest, size)
        mode = "lines+markers" if len(rows) < _FEW else "lines"
        line = {"color": colour, "width": 1.75}
        figure.add_scatter(x=rows[:, 0], y=rows[:, 1], mode=mode, name=name, line=line)
        for label, flat in _compared(curve, run, lines[0]).items():
            figure.add_scatter(
                x=rows[[0, -1], 0], y=[curve.scale * flat] * 2, mode="lines", name=label,
                line={"color": colour if len(runs) > 1 else _GREY, "dash": "dash", "width": 1.25},
            )  # fmt: skip
    if curve.scale == 100 or curve.key in ("images_per_second", "learning_rate"):
        figure.update_yaxes(rangemode="tozero")
    about = curve.about + (f" Means of {coarsest:,} steps." if coarsest > 1 else "")
    return _framed(curve.key, curve.title, about, _styled(figure, "step", curve.axis))


def _compared(curve: _Curve, run: RunRecord, first: Mapping[str, Any]) -> dict[str, float]:
    """What a run's curve is drawn beside, by name; `first` is the first line that has it."""
    flat = {"raw pixels": first[curve.flat]} if curve.flat in first else {}
    return flat | ({"chance": curve.chance(run.config)} if curve.chance else {})


def _times(runs: Mapping[str, RunRecord]) -> str:
    """Where the time of the steps went: over one run, or in all of each."""
    sums = [run.stage_seconds() for run in runs.values()]
    if len(runs) > 1:
        figure = go.Figure()
        for stage, colour in zip(STAGES, COLOURS, strict=False):
            shares = [100 * spent[stage] / sum(spent.values()) for spent in sums]
            figure.add_bar(
                x=shares, y=list(runs), orientation="h", name=_spoken(stage), marker={"color": colour}
            )
        figure.update_layout(barmode="stack")
        figure.update_yaxes(autorange="reversed", automargin=True)
        entries = [(colour, _spoken(stage)) for stage, colour in zip(STAGES, COLOURS, strict=False)]
        figure = _styled(figure, "% of the time", "")
    else:
        figure = _styled(_area(next(iter(runs.values()))), "step", "% of the time")
        whole = sum(sums[0].values())
        entries = [
            (colour, f"{_spoken(stage)} {sums[0][stage] / whole:.0%}")
            for stage, colour in zip(STAGES, COLOURS, strict=False)
        ]
    return _framed("stages", "Where the time went", "Of rank 0, by the clock.", figure, legend(entries))


def _area(run: RunRecord) -> go.Figure:
    keys = [f"{stage}_seconds" for stage in STAGES]
    rows = np.array([[line["step"], *(line.get(key, 0.0) for key in keys)] for line in run.steps], float)
    rows, _ = thinned(rows, _PARTS)
    shares = 100 * rows[:, 1:] / np.maximum(rows[:, 1:].sum(1, keepdims=True), 1e-12)
    figure = go.Figure()
    for stage, colour, share in zip(STAGES, COLOURS, shares.T, strict=False):
        figure.add_scatter(
            x=rows[:, 0], y=share, mode="lines", name=_spoken(stage), stackgroup="all",
            line={"color": colour, "width": 0}, fillcolor=colour,
        )  # fmt: skip
    return figure.update_yaxes(range=[0, 100])


def _spoken(stage: str) -> str:
    return {"data_wait": "waiting for data", "optimizer": "optimiser"}.get(stage, stage)


def _colours(runs: Mapping[str, RunRecord]) -> dict[str, str]:
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(runs)}


def _names(runs: Mapping[str, RunRecord]) -> list[tuple[str, str]]:
    return [(colour, name) for name, colour in _colours(runs).items()]


def _framed(name: str, title: str, about: str, figure: go.Figure, below: str = "") -> str:
    # Without an id of ours each page would have others.
    drawn = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=f"curve-{name}",
        config={"displayModeBar": False, "responsive": True},
    )  # fmt: skip
    return f'<figure><h3>{title}</h3><p class="soft">{about}</p>{drawn}{below}</figure>'


def _styled(figure: go.Figure, across: str, up: str) -> go.Figure:
    grid: dict[str, Any] = {"gridcolor": "rgba(138,145,158,.25)", "zeroline": False, "automargin": True}
    return figure.update_layout(
        template="none",
        height=260,
        margin={"l": 52, "r": 12, "t": 8, "b": 40},
        font={"color": _GREY, "family": "system-ui, sans-serif", "size": 12},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        xaxis={"title": {"text": across, "standoff": 6, "font": {"size": 12}}, **grid},
        yaxis={"title": {"text": up, "standoff": 6, "font": {"size": 12}}, **grid},
        showlegend=False,
        hovermode="x unified",
        hoverlabel={"bgcolor": "#22262d", "font": {"color": "#e6e8eb"}, "bordercolor": "#22262d"},
    )
