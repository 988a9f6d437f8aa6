"""A run on the terminal: its progress bar, and a line for the start and for each evaluation."""

from collections.abc import Iterator
from types import TracebackType
from typing import Any

from cluster.terminal import Bar, Startup
from training.evaluation.certainty import shown, shown_baselines
from training.evaluation.knn import COLLAPSED_RANK
from training.losses.matching import chance


class RunBar:
    """A run's steps on the terminal, a line for each evaluation, and one for the start."""

    def __init__(self, steps: int, done: int, batch_size: int, startup: Startup) -> None:
        self._steps, self._done, self._chance = steps, done, chance(batch_size)
        self._startup: Startup | None = startup
        self._bar: Bar | None = None

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
        if self._bar is None:  # Not before, so that the speed excludes the start.
            self._bar = Bar("train", "step", self._steps, self._done)
        if "loss" not in values:
            print(f"step {values['step']}: {', '.join(_noted(values))}", flush=True)
            return
        if self._startup:
            self._startup.reached("first step")
            print(self._startup, flush=True)
            self._startup = None
        stages = {key: seconds for key, seconds in values.items() if key.endswith("_seconds")}
        waited = values["data_wait_seconds"] / sum(stages.values())
        note = (
            f"epoch {values['epoch']}, loss {values['loss']:.3f}, {self._matched(values)}learning rate "
            f"{values['learning_rate']:.3g}, {values['images_per_second']:,.0f} images/s, "
            f"{waited:.0%} waiting for data"
        )
        self._bar.update(values["step"] - self._bar.done, note=note)

    def _matched(self, values: dict[str, Any]) -> str:
        """View matching, if the objective has it."""
        if "view_matching" not in values:
            return ""
        return f"views matched {values['view_matching']:.1%} (chance {self._chance:.1%}), "


def _noted(values: dict[str, Any]) -> Iterator[str]:
    """Lines for an evaluation, a restart, a warning or quarantined images."""
    if "knn_top1" in values:
        pixels = f" (raw pixels {shown(values, 'knn_top1_pixels')})" if "knn_top1_pixels" in values else ""
        yield f"kNN accuracy {shown(values, 'knn_top1')}{pixels}"
    if "linear_top1" in values:
        yield f"linear probe accuracy {shown(values, 'linear_top1')}"
    if "top1" in values:
        yield f"classifier accuracy {shown(values, 'top1')}"
    if compared := shown_baselines(values):
        yield compared
    if "knn_top1_test" in values:
        yield f"on the test images {shown(values, 'knn_top1_test')}"
        yield shown_baselines(values, "_test")
    if "waiting" in values:
        yield f"waiting for {values['waiting']}"
    if "restarting" in values:
        yield f"resuming from this step: {values['restarting']}"
    if "moving" in values:
        yield "saved, resuming on other nodes"
    if "warning" in values:
        yield f"warning: {values['warning']}"
    if "rolled_back_to" in values:
        yield (
            f"warning: the loss was not finite several times in a row; restored the weights of step "
            f"{values['rolled_back_to']}"
        )
    if "skipped" in values:
        yield f"{values['skipped']:,} steps skipped so far, because the loss or gradient was not finite"
    if "quarantined" in values:
        yield f"{values['quarantined']:,} images quarantined so far"
    if "effective_rank" in values:
        yield f"effective rank {values['effective_rank']:.1f}"
        if values["effective_rank"] < COLLAPSED_RANK:
            yield "warning: the features have collapsed to a point; try a lower learning rate"
