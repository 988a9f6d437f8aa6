"""Whether a run has learned something, why not if it has not, and the commands that come next."""

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines import storage
from training.evaluation.certainty import FEW_IMAGES, shown
from training.evaluation.knn import COLLAPSED_RANK
from training.losses.matching import chance
from training.report.history import RunHistory, collapsed_loss

# Steps at the start and the end of a run that are averaged: one step is of few images.
_FEW_STEPS = 50

# Fewer steps seldom teach a network anything: SimCLR's runs on CIFAR-10 have some 10,000 and more.
_LITTLE_TRAINING = 1_000

# A loss within this share of that of features that are all alike is the same, and so much waiting is long.
_SAME_LOSS, _LONG_WAIT = 0.01, 0.5

# At most so many reasons are given.
_REASONS = 2


@dataclass(frozen=True)
class Verdict:
    """The judgement that a run's metrics allow on its encoder.

    learned: None if the metrics do not tell. evidence: what that rests on. reasons: the most likely ones if
    it has not learned. next: commands.
    """

    learned: bool | None
    evidence: tuple[str, ...]
    reasons: tuple[str, ...]
    next: tuple[str, ...]

    @property
    def title(self) -> str:
        return {True: "Learned", False: "Not learned (yet)", None: "Too early to tell"}[self.learned]

    def __str__(self) -> str:
        lines = [f"{self.title}: {'; '.join(self.evidence)}" if self.evidence else self.title]
        lines += [f"  likely because {reason}" for reason in self.reasons]
        return "\n".join([*lines, "next:", *(f"  {command}" for command in self.next)])


def verdict(run: RunHistory) -> Verdict:
    """Judge the run by kNN accuracy, where it has that, and else by view matching."""
    by_labels, labelled = _by_labels(run)
    by_views, matched = _by_views(run)
    learned = by_views if by_labels is None else by_labels
    reasons = tuple(_reasons(run))[:_REASONS] if learned is False else ()
    return Verdict(learned, tuple(filter(None, (labelled, matched))), reasons, tuple(_next(run)))


def _by_labels(run: RunHistory) -> tuple[bool | None, str]:
    """Whether kNN accuracy is above the untrained encoder's and the largest class by more than its margin."""
    lines = run.lines_with("knn_top1")
    if not lines or not lines[-1]["step"] or lines[0]["step"]:
        return None, ""
    before, after = lines[0], lines[-1]
    others = {"the untrained encoder": before["knn_top1"]}
    if "majority_share" in after:
        others["the largest class"] = after["majority_share"]
    if "knn_top1_pixels" in before:
        others["raw pixels"] = before["knn_top1_pixels"]
    least = after["knn_top1"] - after.get("knn_top1_margin", 0.0)
    learned = all(least > value for name, value in others.items() if name != "raw pixels")
    compared = ", ".join(f"{name} {value:.1%}" for name, value in others.items())
    return learned, f"kNN accuracy {shown(after, 'knn_top1')} ({compared})"


def _by_views(run: RunHistory) -> tuple[bool | None, str]:
    """Whether more views match at the end than at the start, by more than three standard errors."""
    shares = run.lines_with("view_matching").column("view_matching")
    if len(shares) < 2 * _FEW_STEPS:
        return None, ""
    first, last = float(shares[:_FEW_STEPS].mean()), float(shares[-_FEW_STEPS:].mean())
    by_chance, views = chance(run.config.batch_size), 2 * run.config.batch_size * _FEW_STEPS
    error = math.sqrt((first * (1 - first) + last * (1 - last)) / views)
    text = f"views matched {last:.1%} ({first:.1%} in the first {_FEW_STEPS} steps, chance {by_chance:.1%})"
    return last - first > 3 * error and last > 2 * by_chance, text


def _reasons(run: RunHistory) -> Iterator[str]:
    """Why the run may not have learned, the likeliest first."""
    ranks = run.lines_with("effective_rank")
    if ranks and ranks[-1]["effective_rank"] < COLLAPSED_RANK:
        yield "the features have collapsed to a point: lower --optimizer.learning-rate"
    elif (alike := collapsed_loss(run.config)) and _stayed_at(alike, run):
        yield (
            f"the loss has stayed at {alike:.2f}, that of features that are all alike: lower "
            "--optimizer.learning-rate"
        )
    if skipped := len(run.lines_with("skipped")):
        yield f"{skipped:,} steps were skipped, since their loss was not finite: --optimizer.clip-norm 1"
    steps = run.steps[-1]["step"] if run.steps else 0
    if steps < _LITTLE_TRAINING:
        yield f"{steps:,} steps are few: raise --epochs until there are {_LITTLE_TRAINING:,} or more"
    if _waiting(run) > _LONG_WAIT:
        yield f"{_waiting(run):.0%} of the time went into waiting for images: diptych data pack, or more CPUs"
    for line in run.lines_with("evaluated_images")[-1:]:
        if line["evaluated_images"] < FEW_IMAGES:
            yield f"{line['evaluated_images']:,} evaluated images are too few to tell: evaluate more"
    yield "it needs more --epochs, a larger --batch-size or another --optimizer.learning-rate"


def _stayed_at(loss: float, run: RunHistory) -> bool:
    """Whether the last losses are much the same as `loss`."""
    losses = run.steps[-_FEW_STEPS:].column("loss")
    return len(losses) > 0 and abs(losses.mean() / loss - 1) < _SAME_LOSS


def _waiting(run: RunHistory) -> float:
    """The share of the time in steps that rank 0 waited for views."""
    seconds = run.stage_seconds()
    return seconds.get("data_wait", 0.0) / sum(seconds.values()) if seconds else 0.0


def _next(run: RunHistory) -> Iterator[str]:
    """Commands to paste."""
    # Imports torchvision, which takes a second: a run should not wait for it at its start.
    from training.export import torchvision_name

    config, uri = run.config, shlex.quote(run.uri)
    last = run.steps[-1] if run.steps else {"step": 0, "epoch": 0}
    if last["step"] < config.steps if config.steps else last["epoch"] < config.epochs:
        yield f"diptych train --resume {uri}"
    if not run.steps:
        return
    labelled = config.data.test or config.evaluation.held_out
    yield f"diptych eval {uri} --protocol linear{'' if labelled else ' --test LABELLED_IMAGES'}"
    try:
        torchvision_name(config.encoder)
        yield f"diptych export {uri} {shlex.quote(config.name)}.pt"
    except ValueError:
        yield f"diptych export {uri} {shlex.quote(config.name)}.safetensors"
    features = shlex.quote(storage.join(run.uri, "features"))
    yield f"diptych data embed {uri} {shlex.quote(config.data.train)} {features}"
