"""Pictures of a search's trials, readable on light paper and on dark."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tuning.space import Space
from tuning.trials import Trial

_GREY, _BLUE, _ORANGE = "#8a919e", "#3b82c4", "#d9822b"
_STYLE: Any = {
    "svg.hashsalt": "diptych",
    "text.color": _GREY, "axes.labelcolor": _GREY, "axes.edgecolor": _GREY, "xtick.color": _GREY,
    "ytick.color": _GREY, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": _GREY, "grid.alpha": 0.25, "font.size": 9, "axes.facecolor": "none",
    "figure.facecolor": "none", "legend.frameon": False,
}  # fmt: skip

# Subplots beside each other, and inches of one.
_COLUMNS, _WIDE, _HIGH = 3, 3.3, 2.6

_PERCENT = FuncFormatter(lambda value, _: f"{value:.0%}")
_COUNT = FuncFormatter(lambda value, _: f"{value:,.0f}")


def figures(space: Space, trials: Sequence[Trial]) -> Iterator[tuple[str, str, Figure]]:
    """A file's name, a heading and a picture each, of those trials that were judged."""
    judged = [trial for trial in trials if trial.results]
    if not judged:
        return
    with rc_context(_STYLE):
        yield "best-so-far", "Best accuracy so far", _best_so_far(judged)
        yield "trials", "Each trial's accuracy while it trained", _curves(judged)
        yield "keys", "Accuracy against each searched key", _keys(space, judged)
        yield "parallel", "Which values went together", _parallel(space, judged)
        if len({trial.multiply_adds for trial in judged}) > 1:
            yield "cost", "Accuracy against cost, and the Pareto front", _cost(judged)


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


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other beats in accuracy for at most as many multiply-adds, cheapest first."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.multiply_adds, -_accuracy(trial))):
        if not front or _accuracy(trial) > _accuracy(front[-1]):
            front.append(trial)
    return front


def _subplots(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(6.0, _WIDE * columns), _HIGH * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def _best_so_far(trials: Sequence[Trial]) -> Figure:
    seconds, images, best = zip(*progress(trials), strict=True)
    figure, (over_time, over_images) = _subplots(2)
    over_time.step([one / 60 for one in seconds], best, where="post", color=_BLUE)
    over_time.set_xlabel("minutes since the search began")
    over_images.step(images, best, where="post", color=_BLUE)
    over_images.set_xlabel("images that all trials trained on")
    over_images.xaxis.set_major_locator(MaxNLocator(4))
    over_images.xaxis.set_major_formatter(_COUNT)
    for axes in (over_time, over_images):
        axes.yaxis.set_major_formatter(_PERCENT)
    over_time.set_ylabel("accuracy")
    return figure


def _curves(trials: Sequence[Trial]) -> Figure:
    figure, (axes,) = _subplots(1)
    best = max(trials, key=lambda trial: trial.score or 0)
    for trial in trials:
        stopped = trial.state == "stopped early"
        axes.plot(
            [result.images for result in trial.results],
            [result.accuracy for result in trial.results],
            color=_BLUE if trial is best else _GREY, alpha=1 if trial is best else 0.6, lw=1.2,
            marker="x" if stopped else "o", markevery=[-1], ms=5, zorder=3 if trial is best else 2,
        )  # fmt: skip
    axes.plot([], [], color=_BLUE, label="the best")
    if any(trial.state == "stopped early" for trial in trials):
        axes.plot([], [], color=_GREY, marker="x", lw=0, label="stopped early")
    axes.legend()
    axes.set_xlabel("images that the trial trained on")
    axes.set_ylabel("accuracy")
    axes.xaxis.set_major_formatter(_COUNT)
    axes.yaxis.set_major_formatter(_PERCENT)
    return figure


def _keys(space: Space, trials: Sequence[Trial]) -> Figure:
    keys = _searched(trials)
    figure, places = _subplots(len(keys))
    for key, axes in zip(keys, places, strict=True):
        place = _Scale(space, key, trials)
        for state, colour, marker in (("", _BLUE, "o"), ("stopped early", _ORANGE, "x")):
            some = [t for t in trials if key in t.values and (t.state == "stopped early") == bool(state)]
            if not some:
                continue
            axes.scatter(
                [place.of(trial.values[key]) for trial in some],
                [_accuracy(trial) for trial in some],
                c=colour, marker=marker, s=22, label=state or "trained to the end",
            )  # fmt: skip
        ticks = place.ticks()
        axes.set_xticks([place.of(value) for value in ticks], [_short(value) for value in ticks])
        axes.set_xlim(place.low - 0.05 * place.span, place.high + 0.05 * place.span)
        axes.set_xlabel(key)
        axes.yaxis.set_major_formatter(_PERCENT)
    places[0].set_ylabel("accuracy")
    if any(trial.state == "stopped early" for trial in trials):
        places[0].legend(loc="best")
    return figure


def _parallel(space: Space, trials: Sequence[Trial]) -> Figure:
    keys = _searched(trials)
    figure = Figure(figsize=(max(6.0, 1.6 * (len(keys) + 1)), 3.2), layout="constrained")
    axes = figure.add_subplot()
    accuracies = [_accuracy(trial) for trial in trials]
    norm = Normalize(min(accuracies), max(accuracies) if max(accuracies) > min(accuracies) else 1.0)
    scales = [_Scale(space, key, trials) for key in keys]
    for trial, accuracy in sorted(zip(trials, accuracies, strict=True), key=lambda pair: pair[1]):
        heights = [
            scale.share(trial.values[key]) if key in trial.values else math.nan
            for key, scale in zip(keys, scales, strict=True)
        ]
        axes.plot([*heights, float(norm(accuracy))], color=colormaps["viridis"](norm(accuracy)), lw=1.5)
    for number, scale in enumerate(scales):
        for value in scale.ticks():
            axes.text(number + 0.03, scale.share(value), _short(value), fontsize=8, va="center")
    for height in (0.0, 1.0):
        axes.text(len(keys) + 0.03, height, f"{norm.inverse(height):.1%}", fontsize=8, va="center")
    axes.set_xticks(range(len(keys) + 1), [*(key.replace(".", ".\n") for key in keys), "accuracy"])
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlim(-0.05, len(keys) + 0.35)
    return figure


def _cost(trials: Sequence[Trial]) -> Figure:
    figure, (axes,) = _subplots(1)
    axes.scatter([t.multiply_adds / 1e6 for t in trials], [_accuracy(t) for t in trials], c=_GREY, s=22)
    front = pareto_front(trials)
    axes.step(
        [trial.multiply_adds / 1e6 for trial in front], [_accuracy(trial) for trial in front],
        where="post", color=_BLUE, marker="o", ms=4, label="Pareto front",
    )  # fmt: skip
    axes.legend()
    axes.set_xlabel("millions of multiply-adds for one view")
    axes.set_ylabel("accuracy")
    axes.yaxis.set_major_formatter(_PERCENT)
    return figure


class _Scale:
    """Where a key's values lie on an axis: numbers by size, or its logarithm; choices side by side."""

    def __init__(self, space: Space, key: str, trials: Sequence[Trial]) -> None:
        what = space.get(key)
        values = [trial.values[key] for trial in trials if key in trial.values]
        # Lists among them have no hash.
        self._values = sorted({repr(value): value for value in values}.values(), key=_order)
        self._log = what is not None and what.kind == "loguniform"
        self._named = what is not None and what.kind == "choice"
        self._ends = None if what is None or self._named else what.values
        ends = [self.of(value) for value in (self._ends or (self._values[0], self._values[-1]))]
        self.low, self.high = ends
        self.span = (self.high - self.low) or 1.0

    def of(self, value: Any) -> float:
        if self._named:
            return float(self._values.index(value))
        return math.log(value) if self._log else float(value)

    def share(self, value: Any) -> float:
        """From 0 to 1."""
        return (self.of(value) - self.low) / self.span if self.high > self.low else 0.5

    def ticks(self) -> list[Any]:
        if self._named:
            return self._values
        low, high = self._ends or (self._values[0], self._values[-1])
        middle = math.sqrt(low * high) if self._log else (low + high) / 2
        return [low, middle, high] if high > low else [low]


def _accuracy(trial: Trial) -> float:
    return trial.accuracy or 0.0


def _searched(trials: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(key for trial in trials for key in trial.values))


def _order(value: Any) -> tuple[bool, Any]:
    """Numbers by size, before names."""
    number = isinstance(value, int | float)
    return not number, value if number else str(value)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
