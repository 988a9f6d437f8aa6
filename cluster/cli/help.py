"""The help of `diptych train` in panels, and flags that people know from elsewhere."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cyclopts.help import DefaultFormatter, HelpEntry, HelpPanel

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

ALL = "--help-all"

EXAMPLES = """Examples:

    diptych train --data.train photos --data.view.size 64 --encoder.name resnet18 --epochs 50 --name first

    diptych train simclr-cifar10-resnet18 --data.train s3://my-bucket/train --output s3://my-bucket/runs
"""

_COMMON = {
    "--resume", "--data.train", "--data.test", "--data.view.size", "--evaluation.held-out", "--encoder.name",
    "--objective", "--batch-size", "--epochs", "--optimizer.learning-rate", "--temperature", "--workers",
    "--output", "--name",
}  # fmt: skip

# Each panel's title, and the flags or the beginnings of flags in it; the first that fits has a flag.
_PANELS = {
    "Common": (),
    "Views": ("--data.view.", "--data.recipe"),
    "Second view": ("--data.second-view.",),
    "Data": ("--data.",),
    "Encoder": ("--encoder.", "--init"),
    "Objective": ("--objective-options", "--projector.", "--simclr.", "--byol.", "--supervised."),
    "Optimiser": ("--optimizer.", "--steps", "--micro-batch-size", "--precision", "--compile"),
    "Evaluation": ("--evaluation.",),
    "Checkpoints": ("--checkpoint.",),
    "Cluster": ("--cpus-per-worker", "--gpus-per-worker", "--wait-for-nodes", "--retries", "--timeout"),
    "Other": ("",),
}
_SECOND = (
    "--data.second-view has the same fields as --data.view, and each one that is unset has the value of "
    f"--data.view or of the recipe. {ALL} shows them."
)

# Flags of other libraries and programs.
MEANT = {
    "--lr": "--optimizer.learning-rate", "--learning-rate": "--optimizer.learning-rate",
    "--wd": "--optimizer.weight-decay", "--weight-decay": "--optimizer.weight-decay",
    "--momentum": "--optimizer.momentum", "--opt": "--optimizer.name",
    "--warmup": "--optimizer.warmup-epochs", "--warmup-epochs": "--optimizer.warmup-epochs",
    "--clip-grad": "--optimizer.clip-norm", "--ema": "--optimizer.average-decay",
    "--arch": "--encoder.name", "--model": "--encoder.name", "--backbone": "--encoder.name",
    "--pretrained": "--init", "--weights": "--init",
    "--method": "--objective", "--loss": "--simclr.loss", "--tau": "--temperature",
    "--dataset": "--data.train", "--train": "--data.train",
    "--train-dir": "--data.train", "--data-dir": "--data.train", "--test": "--data.test",
    "--val": "--data.test", "--val-dir": "--data.test", "--img-size": "--data.view.size",
    "--image-size": "--data.view.size", "--input-size": "--data.view.size", "--size": "--data.view.size",
    "--batch": "--batch-size", "--bs": "--batch-size", "--max-epochs": "--epochs", "--max-steps": "--steps",
    "--num-workers": "--cpus-per-worker", "--devices": "--workers", "--gpus": "--gpus-per-worker",
    "--num-gpus": "--gpus-per-worker", "--nodes": "--workers", "--amp": "--precision",
    "--fp16": "--precision", "--bf16": "--precision", "--accum": "--micro-batch-size",
    "--knn-k": "--evaluation.neighbours", "--val-split": "--evaluation.held-out", "--out": "--output",
    "--output-dir": "--output", "--save-dir": "--output", "--log-dir": "--output", "--run-name": "--name",
    "--wandb": "--trackers wandb", "--mlflow": "--trackers mlflow",
}  # fmt: skip


class TrainHelp(DefaultFormatter):
    """The flags in panels by subject. The second view's are left out unless everything is asked for."""

    def __init__(self, *, everything: bool) -> None:
        super().__init__()
        self._everything = everything

    def __call__(self, console: "Console", options: "ConsoleOptions", panel: HelpPanel) -> None:
        if panel.title != "Parameters":
            super().__call__(console, options, panel)
            return
        for title, entries in _by_panel(panel.entries).items():
            if title == "Second view" and not self._everything:
                console.print(f"{_SECOND}\n", markup=False, highlight=False)
            elif entries:
                super().__call__(console, options, panel.copy(title=title, entries=entries))


def _by_panel(entries: Sequence[HelpEntry]) -> dict[str, list[HelpEntry]]:
    panels: dict[str, list[HelpEntry]] = {title: [] for title in _PANELS}
    for entry in entries:
        name = (*entry.positive_names, *entry.negative_names)[0]
        fits = (title for title, beginnings in _PANELS.items() if name.startswith(beginnings))
        panels["Common" if name in _COMMON else next(fits)].append(entry)
    return panels


def meant(flag: str) -> str | None:
    """diptych's flag for one of another library, if it is known."""
    return MEANT.get(flag.partition("=")[0].replace("_", "-"))
