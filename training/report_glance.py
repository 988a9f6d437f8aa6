"""Runs at a glance: numbers, words, and which keys of their configs differ."""

import html
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from training.certainty import shown
from training.losses.matching import chance
from training.objective_config import objective_title
from training.record import to_values
from training.report_run import RunRecord

_ACCURACIES = {
    "knn_top1": "kNN, trained",
    "knn_top1_test": "kNN, test images",
    "linear_top1": "linear probe",
    "top1": "classifier",
}

# Steps whose view matching is taken together: a single one's is that of few images.
_LAST_STEPS = 50

# Where one part of a path or of a dotted key ends.
_JOINT = re.compile("(?<=[/._])(?=[A-Za-z])")


def numbers(run: RunRecord) -> list[tuple[str, str]]:
    """Pairs of what was measured and its value; only what the run has."""
    return _accuracies(run) + _progress(run) + _faults(run)


def words(run: RunRecord) -> list[tuple[str, str]]:
    """Pairs of what the run is and its value."""
    config = run.config
    watched = config.data.test or (
        f"{config.evaluation.held_out:.0%} held out" if config.evaluation.held_out else "none"
    )
    encoder = config.encoder.name + (f", width {config.encoder.width:g}" if config.encoder.width else "")
    return [
        ("data", config.data.train),
        ("evaluation images", watched),
        ("views", f"{config.data.recipe}, {config.data.view.size} pixels"),
        ("encoder", encoder),
        ("objective", objective_title(config.objective)),
        ("batch", f"{config.batch_size:,} images in {config.lanes} lanes"),
        ("optimiser", f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}"),
        ("workers", _workers(run)),
    ]


def _workers(run: RunRecord) -> str:
    """How many there were, one part of the run after the other, or how many there shall be."""
    counts = [str(count) for count, _ in groupby(line["workers"] for line in run.having("workers"))]
    return ", then ".join(counts) or str(run.config.workers or "one for each GPU, or one")


def glance_table(runs: Mapping[str, RunRecord]) -> str:
    """The runs side by side, by their names, as HTML."""
    columns = [dict(words(run) + numbers(run)) for run in runs.values()]
    labels = dict.fromkeys(label for column in columns for label in column)
    return table(["", *runs], [[label, *(column.get(label, "") for column in columns)] for label in labels])


def differences_table(runs: Mapping[str, RunRecord]) -> str:
    """The keys of the configs that differ between the runs, as HTML."""
    values = [flat(to_values(run.config)) for run in runs.values()]
    keys = sorted({key for each in values for key in each} - {"name", "output"})
    rows = [[key, *(str(each.get(key, "not set")) for each in values)] for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    if not differing:
        return '<p class="note">None: the configs differ in nothing but name and output.</p>'
    return table(["", *runs], differing)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as HTML, whose first column says what the others are; `heads` may be none."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    top = f"<thead><tr>{head}</tr></thead>" if heads else ""
    return f'<table class="plain">{top}<tbody>{body}</tbody></table>'


def _cell(text: str) -> str:
    """A path or a dotted key may be broken between its parts."""
    return f"<td>{_JOINT.sub('<wbr>', html.escape(text))}</td>"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, in two or three digits."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _accuracies(run: RunRecord) -> list[tuple[str, str]]:
    facts = []
    for key, label in _ACCURACIES.items():
        lines = [line for line in run.having(key) if line["step"]]
        facts += [(label, shown(lines[-1], key))] if lines else []
    for line in run.having("knn_top1")[:1]:
        if line["step"] == 0:
            facts.append(("kNN, untrained", shown(line, "knn_top1")))
        if "knn_top1_pixels" in line:
            facts.append(("kNN, raw pixels", shown(line, "knn_top1_pixels")))
    for line in run.having("evaluated_images")[-1:]:
        facts += compared(line)
    return facts


def compared(line: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the accuracies of a line of metrics are of, and are compared with; nothing in older runs."""
    facts = []
    for suffix, which in (("", ""), ("_test", ", test images")):
        if f"evaluated_images{suffix}" not in line:
            continue
        facts += [
            (f"images evaluated{which}", f"{line[f'evaluated_images{suffix}']:,}"),
            (f"largest class{which}", f"{line[f'majority_share{suffix}']:.1%}"),
            (f"chance{which}", f"{line[f'chance{suffix}']:.1%}"),
            (f"training images compared with{which}", f"{line[f'bank_images{suffix}']:,}"),
            (f"neighbours{which}", f"{line[f'neighbours{suffix}']:,}"),
        ]
        if twice := line.get(f"trained_on_images{suffix}"):
            facts.append((f"evaluated and trained on{which}", f"{twice:,}"))
    return facts


def _progress(run: RunRecord) -> list[tuple[str, str]]:
    if not run.steps:
        return []
    last, config = run.steps[-1], run.config
    rates = sorted(line["images_per_second"] for line in run.steps)
    return [
        ("last loss", f"{last['loss']:.3f}"),
        *_matching(run),
        ("steps", f"{last['step']:,}" + (f" of {config.steps:,}" if config.steps else "")),
        ("epochs", f"{last['epoch']}" + ("" if config.steps else f" of {config.epochs}")),
        ("images/s, median", f"{rates[len(rates) // 2]:,.0f}"),
        ("spent in steps", duration(run.seconds)),
    ]


def _matching(run: RunRecord) -> list[tuple[str, str]]:
    """View matching of the last steps, where the objective has one."""
    shares = [line["view_matching"] for line in run.having("view_matching")[-_LAST_STEPS:]]
    if not shares:
        return []
    by_chance = chance(run.config.batch_size)
    return [("views matched", f"{sum(shares) / len(shares):.1%} (chance {by_chance:.1%})")]


def _faults(run: RunRecord) -> list[tuple[str, str]]:
    """What went wrong; nothing where nothing did."""
    counts = {
        "steps skipped": len(run.having("skipped")),
        "times gone back": len(run.having("rolled_back_to")),
        "times gone on from a checkpoint": max(0, len(run.having("workers")) - 1),
        "warnings": len(run.having("warning")),
        "images left out": max((line["quarantined"] for line in run.having("quarantined")), default=0),
    }
    return [(label, f"{count:,}") for label, count in counts.items() if count]
