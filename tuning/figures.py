"""Figures of a search's trials, by Optuna and plotly, for a page that needs no network."""

import html
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from training.report.page import COLOURS, GREY, plot_html, plotly_script, styled
from tuning.space import Distribution, Space
from tuning.trials import Trial

if TYPE_CHECKING:
    import optuna

_BLUE, _ORANGE, *_ = COLOURS

STYLE = """
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.figures > div { min-width: 0; } .figures > .whole { grid-column: 1 / -1; }
"""


class Section(NamedTuple):
    """Figures by name, below a heading and a line that explains them."""

    heading: str
    note: str
    figures: dict[str, go.Figure]


def sections(space: Space, trials: Sequence[Trial]) -> list[Section]:
    """All figures of the trials that have an accuracy; none if there are no such trials."""
    evaluated = sorted((trial for trial in trials if trial.results), key=lambda trial: trial.number)
    if not evaluated:
        return []
    study = _study(space, evaluated)
    early = any(trial.state == "stopped early" for trial in evaluated)
    crosses = "Crosses: stopped early. " if early else ""
    found = [
        Section("Best accuracy so far", "After each evaluation.", _best_so_far(evaluated)),
        Section(
            "Each trial's accuracy while it trained",
            crosses + "Blue: the best trial.",
            {"trials": _curves(study, evaluated)},
        ),
        Section("Accuracy against each searched key", crosses, dict(_slices(study, evaluated))),
        Section(
            "Which values went together", "A line for each trial.", {"parallel": _parallel(study, evaluated)}
        ),
    ]
    if len({trial.multiply_adds for trial in evaluated}) > 1:
        note = "Blue: no other trial is as accurate at the same cost or less."
        found.append(Section("Accuracy against cost, and the Pareto front", note, {"cost": _cost(evaluated)}))
    return found


def drawn(sections: Sequence[Section]) -> str:
    """The sections as HTML, including the script that draws the figures."""
    if not sections:
        return ""
    body = "".join(
        f'<h2>{section.heading}</h2><p class="soft">{section.note}</p>{_grid(section.figures)}'
        for section in sections
    )
    return f"{plotly_script()}{body}"


def progress(trials: Sequence[Trial]) -> list[tuple[float, int, float]]:
    """After each evaluation: seconds, images that all trials trained on, and the best accuracy so far."""
    events = [(result.seconds, trial.number, result) for trial in trials for result in trial.results]
    seen: dict[int, int] = {}
    best, line = 0.0, []
    for seconds, number, result in sorted(events, key=lambda event: event[:2]):
        seen[number] = max(seen.get(number, 0), result.images)
        best = max(best, result.accuracy)
        line.append((seconds, sum(seen.values()), best))
    return line


def _best_so_far(trials: Sequence[Trial]) -> dict[str, go.Figure]:
    seconds, images, best = zip(*progress(trials), strict=True)
    found = {}
    for name, title, values in (
        ("minutes", "minutes since the search began", [second / 60 for second in seconds]),
        ("images", "images that all trials trained on", images),
    ):
        line = {"shape": "hv", "color": _BLUE}
        figure = go.Figure(go.Scatter(x=values, y=best, mode="lines+markers", line=line))
        found[f"best-over-{name}"] = _styled(figure, title)
    return found


def _curves(study: "optuna.Study", evaluated: Sequence[Trial]) -> go.Figure:
    from optuna.visualization import plot_intermediate_values

    figure: Any = plot_intermediate_values(study)
    best = max(evaluated, key=lambda trial: trial.score or 0)
    for curve, trial in zip(figure.data, evaluated, strict=True):
        colour = _BLUE if trial is best else GREY
        symbols = ["circle"] * (len(trial.results) - 1) + [_symbol(trial)]
        marker = {"color": colour, "symbol": symbols, "maxdisplayed": 0}
        curve.update(line={"color": colour}, marker=marker, name=f"trial {trial.number}")
    return _styled(figure, "images that the trial trained on", height=360)


def _slices(study: "optuna.Study", evaluated: Sequence[Trial]) -> Iterator[tuple[str, go.Figure]]:
    from optuna.visualization import plot_slice

    for key in _searched(evaluated):
        figure: Any = plot_slice(study, params=[key])
        for points in figure.data:  # Optuna's colour of a point is its trial's number in the study.
            shown = [evaluated[number] for number in points.marker.color]
            colours = [_ORANGE if trial.state == "stopped early" else _BLUE for trial in shown]
            marker = {"color": colours, "symbol": list(map(_symbol, shown)), "showscale": False}
            points.update(marker=marker, text=[f"trial {trial.number}" for trial in shown])
        if labels := figure.layout.xaxis.categoryarray:
            figure.update_xaxes(tickvals=labels, ticktext=[html.escape(label.strip("'")) for label in labels])
        yield f"key-{key}", _styled(figure, key)


def _parallel(study: "optuna.Study", evaluated: Sequence[Trial]) -> go.Figure:
    from optuna.visualization import plot_parallel_coordinate

    figure: Any = plot_parallel_coordinate(study, target_name="accuracy")
    # Optuna's colours, white to dark blue, are invisible on a light or on a dark page.
    for line in figure.select_traces({"mode": "lines"}):
        (colour,) = sample_colorscale(
            "Viridis", [line.y[0]]
        )  # The first axis is the accuracy's, from 0 to 1.
        line.update(line={"color": colour, "width": 1.5}, opacity=0.8)
    figure.update_traces(
        marker={"colorscale": "Viridis", "reversescale": False}, selector={"mode": "markers"}
    )
    # Optuna's axes are the accuracy and then the keys in order; it cuts long names.
    names = ["accuracy", *(key.replace(".", ".<br>") for key in sorted(_searched(evaluated)))]
    figure = _styled(figure, "", height=380).update_annotations(font_color=GREY)
    figure.update_xaxes(ticktext=names, showgrid=False)
    return figure.update_layout(hovermode="closest")


def _cost(evaluated: Sequence[Trial]) -> go.Figure:
    import optuna
    from optuna.visualization import plot_pareto_front

    study = _quiet_study(directions=["minimize", "maximize"])
    for trial in evaluated:
        values = [trial.multiply_adds / 1e6, trial.accuracy or 0.0]
        study.add_trial(optuna.trial.create_trial(values=values))
    figure: Any = plot_pareto_front(study, target_names=["cost", "accuracy"])
    others, front = figure.data
    others.update(marker={"color": GREY, "showscale": False}, hoverinfo="x+y", hovertemplate=None)
    front.update(marker={"color": _BLUE, "showscale": False}, hoverinfo="x+y", hovertemplate=None)
    return _styled(figure, "millions of multiply-adds for one view", height=360)


def _study(space: Space, trials: Sequence[Trial]) -> "optuna.Study":
    """A study with the trials in the same order."""
    import optuna

    study = _quiet_study(direction="maximize")
    distributions = {key: _distribution(space.get(key), trials, key) for key in _searched(trials)}
    for trial in trials:
        study.add_trial(
            optuna.trial.create_trial(
                value=trial.accuracy,
                params={key: _param(value) for key, value in trial.values.items()},
                distributions={key: distributions[key] for key in trial.values},
                intermediate_values={result.images: result.accuracy for result in trial.results},
            )
        )
    return study


def _quiet_study(**settings: Any) -> "optuna.Study":
    import logging

    import optuna

    optuna.logging.set_verbosity(logging.WARNING)
    return optuna.create_study(**settings)


def _distribution(of: Distribution | None, trials: Sequence[Trial], key: str) -> Any:
    """Optuna's distribution of a key; it includes the trials' values, even if the space has changed since."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    tried = [_param(trial.values[key]) for trial in trials if key in trial.values]
    if of and of.kind == "choice":
        return CategoricalDistribution(list(dict.fromkeys([*map(_param, of.values), *tried])))
    values = [*tried, *(of.values if of else ())]
    return FloatDistribution(min(values), max(values), log=of is not None and of.kind == "loguniform")


def _param(value: Any) -> Any:
    """A value for Optuna, which takes no lists as choices."""
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _searched(trials: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(key for trial in trials for key in trial.values))


def _symbol(trial: Trial) -> str:
    return "x" if trial.state == "stopped early" else "circle"


def _styled(figure: Any, title: str, height: int = 270) -> go.Figure:
    figure = styled(figure.update_layout(title=None, width=None), html.escape(title), "accuracy")
    return figure.update_layout(height=height, hovermode="closest", yaxis={"tickformat": ".0%"})


def _grid(figures: dict[str, go.Figure]) -> str:
    """The figures side by side; a single one over the whole width."""
    kind = ' class="whole"' if len(figures) == 1 else ""
    plots = (plot_html(figure, f"figure-{name}") for name, figure in figures.items())
    return f'<div class="figures">{"".join(f"<div{kind}>{plot}</div>" for plot in plots)}</div>'
