"""Runs in words and numbers, for a report: measurements, settings, and where configs differ."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np

from training.config.objective import objective_title
from training.evaluation.certainty import shown
from training.losses.matching import chance
from training.report.history import RunHistory
from training.run_folder import to_values

_ACCURACIES = {
    "knn_top1": "kNN, trained",
    "knn_top1_test": "kNN, test images",
    "linear_top1": "linear probe",
    "top1": "classifier",
}

# View matching is averaged over so many steps: that of one step is of few images.
_LAST_STEPS = 50


def measurements(run: RunHistory) -> list[tuple[str, str]]:
    """Pairs of a label and a value, for all that the run has measured."""
    return _accuracies(run) + _progress(run) + _faults(run)


def settings(run: RunHistory) -> list[tuple[str, str]]:
    """Pairs of a label and a value, for the most telling settings."""
    config = run.config
    evaluated = config.data.test or (
        f"{config.evaluation.held_out:.0%} held out" if config.evaluation.held_out else "none"
    )
    encoder = config.encoder.name + (f", width {config.encoder.width:g}" if config.encoder.width != 1 else "")
    return [
        ("data", config.data.train),
        ("evaluation images", evaluated),
        ("views", f"{config.data.recipe}, {config.data.view.size} pixels"),
        ("encoder", encoder),
        ("objective", objective_title(config.objective)),
        ("batch", f"{config.batch_size:,} images in {config.lanes} lanes"),
        ("optimiser", f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}"),
        ("workers", _workers(run)),
    ]


def summary_rows(runs: Mapping[str, RunHistory]) -> list[list[str]]:
    """A row per setting and measurement: its label, then each run's value."""
    columns = [dict(settings(run) + measurements(run)) for run in runs.values()]
    labels = dict.fromkeys(label for column in columns for label in column)
    return [[label, *(column.get(label, "") for column in columns)] for label in labels]


def differing_rows(runs: Mapping[str, RunHistory]) -> list[list[str]]:
    """A row per config key that differs, other than name and output: the key, then each run's value."""
    values = [_flat(to_values(run.config)) for run in runs.values()]
    keys = sorted({key for each in values for key in each} - {"name", "output"})
    rows = [[key, *(str(each.get(key, "not set")) for each in values)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def evaluation_facts(line: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How many images the accuracies of a line of metrics are of, and their baselines; none in older runs."""
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
        if duplicates := line.get(f"trained_on_images{suffix}"):
            facts.append((f"evaluated and trained on{which}", f"{duplicates:,}"))
    return facts


def _workers(run: RunHistory) -> str:
    """The number of workers in each part of the run; before it starts, the number that is configured."""
    counts = [str(count) for count, _ in groupby(line["workers"] for line in run.lines_with("workers"))]
    return ", then ".join(counts) or str(run.config.workers or "one for each GPU, or one")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _accuracies(run: RunHistory) -> list[tuple[str, str]]:
    facts = []
    for key, label in _ACCURACIES.items():
        lines = run.lines_with(key)
        # That of step 0 is of the untrained encoder.
        facts += [(label, shown(lines[-1], key))] if lines and lines[-1]["step"] else []
    for line in run.lines_with("knn_top1")[:1]:
        if line["step"] == 0:
            facts.append(("kNN, untrained", shown(line, "knn_top1")))
        if "knn_top1_pixels" in line:
            facts.append(("kNN, raw pixels", shown(line, "knn_top1_pixels")))
    for line in run.lines_with("evaluated_images")[-1:]:
        facts += evaluation_facts(line)
    return facts


def _progress(run: RunHistory) -> list[tuple[str, str]]:
    steps = run.steps
    if not steps:
        return []
    last, config = steps[-1], run.config
    rates = np.sort(steps.column("images_per_second"))
    return [
        ("last loss", f"{last['loss']:.3f}"),
        *_view_matching(run),
        ("steps", f"{last['step']:,}" + (f" of {config.steps:,}" if config.steps else "")),
        ("epochs", f"{last['epoch']}" + ("" if config.steps else f" of {config.epochs}")),
        ("images/s, median", f"{rates[len(rates) // 2]:,.0f}"),
        ("time in steps", _duration(run.seconds)),
    ]


def _view_matching(run: RunHistory) -> list[tuple[str, str]]:
    shares = run.lines_with("view_matching")[-_LAST_STEPS:].column("view_matching")
    if not shares.size:
        return []
    by_chance = chance(run.config.batch_size)
    return [
        ("views matched", f"{shares.mean():.1%}"),
        ("views matched by chance", f"{by_chance:.1%}"),
    ]


def _faults(run: RunHistory) -> list[tuple[str, str]]:
    """Counts of what went wrong; only those above zero."""
    counts = {
        "steps skipped": len(run.lines_with("skipped")),
        "rollbacks": len(run.lines_with("rolled_back_to")),
        "resumes": max(0, len(run.lines_with("workers")) - 1),
        "warnings": len(run.lines_with("warning")),
        "images quarantined": max((line["quarantined"] for line in run.lines_with("quarantined")), default=0),
    }
    return [(label, f"{count:,}") for label, count in counts.items() if count]


def _duration(seconds: float) -> str:
    """In seconds, minutes or hours, with two or three digits."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
