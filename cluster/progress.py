"""Progress on the terminal: of things that are counted, and of a run."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from tqdm import tqdm

from cluster.startup import Startup
from training.certainty import shown, shown_baselines
from training.diagnostics import COLLAPSED_RANK
from training.losses.matching import chance

# How often a run's progress is told where it is no terminal that shows it.
_LOG_SECONDS = 30.0


class _Lines:
    """A bar's file that is no terminal: each state of the bar becomes a line of its own."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Each line is, as it comes."""


def bar(**settings: Any) -> tqdm:
    """A bar on the terminal; a line now and then in a log."""
    if sys.stderr.isatty():
        return tqdm(**settings)
    return tqdm(**settings, file=_Lines(), mininterval=_LOG_SECONDS, maxinterval=_LOG_SECONDS)


@contextmanager
def counted(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """What is called with (done, of how many); there is a bar from the first second on."""
    with bar(desc=what, unit=unit, leave=False, delay=1) as shown:

        def progress(done: int, of: int) -> None:
            shown.total = of
            shown.update(done - shown.n)

        yield progress


def warn(message: str) -> None:
    """Print a warning on the terminal."""
    print(f"diptych: warning: {message}", file=sys.stderr)


class RunBar:
    """The steps of a run on the terminal, a line for each evaluation, and one on how it started."""

    def __init__(self, steps: int, done: int, batch_size: int, startup: Startup) -> None:
        self._steps, self._done, self._chance = steps, done, chance(batch_size)
        self._startup: Startup | None = startup
        self._bar: tqdm | None = None

    def __enter__(self) -> "RunBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.close()

    def show(self, values: dict[str, Any]) -> None:
        if "phase" in values:
            if self._startup:
                self._startup.reached(values["phase"])
            return
        if self._bar is None:  # Only now do steps take time, and not the cluster's start.
            self._bar = bar(total=self._steps, initial=self._done, desc="train", unit="step", smoothing=0.1)
        if "loss" not in values:
            self._bar.write(f"step {values['step']}: {', '.join(_noted(values))}")
            return
        if self._startup:
            self._startup.reached("first step")
            self._bar.write(str(self._startup))
            self._startup = None
        stages = {key: seconds for key, seconds in values.items() if key.endswith("_seconds")}
        waited = values["data_wait_seconds"] / sum(stages.values())
        self._bar.set_postfix_str(
            f"epoch {values['epoch']}, loss {values['loss']:.3f}, {self._matched(values)}learning rate "
            f"{values['learning_rate']:.3g}, {values['images_per_second']:,.0f} images/s, "
            f"{waited:.0%} waiting for data",
            refresh=False,
        )
        self._bar.update(values["step"] - self._bar.n)

    def _matched(self, values: dict[str, Any]) -> str:
        """View matching, where the objective has one."""
        if "view_matching" not in values:
            return ""
        return f"views matched {values['view_matching']:.1%} (chance {self._chance:.1%}), "


def _noted(values: dict[str, Any]) -> Iterator[str]:
    """What an evaluation, or a look at the images left out, found."""
    if "knn_top1" in values:
        pixels = f" (raw pixels {shown(values, 'knn_top1_pixels')})" if "knn_top1_pixels" in values else ""
        yield f"kNN accuracy {shown(values, 'knn_top1')}{pixels}"
    if "linear_top1" in values:
        yield f"linear probe's accuracy {shown(values, 'linear_top1')}"
    if "top1" in values:
        yield f"classifier's accuracy {shown(values, 'top1')}"
    if compared := shown_baselines(values):
        yield compared
    if "knn_top1_test" in values:
        yield f"on the test images {shown(values, 'knn_top1_test')}"
        yield shown_baselines(values, "_test")
    if "waiting" in values:
        yield f"waiting for {values['waiting']}"
    if "restarting" in values:
        yield f"going on from there, for {values['restarting']}"
    if "moving" in values:
        yield "saved, and going on from there on other nodes"
    if "warning" in values:
        yield f"warning: {values['warning']}"
    if "rolled_back_to" in values:
        yield (
            f"warning: the loss was not finite several times in a row; back to the weights of step "
            f"{values['rolled_back_to']}"
        )
    if "skipped" in values:
        yield f"{values['skipped']:,} steps skipped so far, whose loss or gradient was not finite"
    if "quarantined" in values:
        yield f"{values['quarantined']:,} images left out so far"
    if "effective_rank" in values:
        yield f"effective rank {values['effective_rank']:.1f}"
        if values["effective_rank"] < COLLAPSED_RANK:
            yield "warning: the features have collapsed to a point; try a lower learning rate"
