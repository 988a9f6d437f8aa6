"""A run's result depends on its config alone: the same run on one, two and four workers, and once killed.

    python benchmarks/promise.py    # handwritten digits: 8 minutes on two cores

Trains the demo's config with exact=true on one, two and four workers, and once more on four, killed without
warning after a third of the steps and resumed on one. Their losses, weights and accuracies must be the same,
bit for bit. To compare, it trains on two workers without exact, which differs by rounding that grows with
each step, and with another seed. Prints the losses, a digest of the last weights, how far the losses are from
those of one worker, and the accuracies; --picture draws the losses. Exits with 1 if the bits differ.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # Before torch reads it.

import numpy as np
from jaxtyping import Float

from cluster import cluster, run_training
from cluster.digits import scattered_digits
from pipelines.shards import write_shards
from training import TrainConfig, read_metrics
from training.checkpoint import Checkpoints
from training.config import shipped_config
from training.run_folder import to_toml

Losses = Float[np.ndarray, " steps"]

_IMAGES, _TEST_IMAGES = 2048, 1024
_KILLED, _ROUNDED, _SEED = "4, killed, then 1", "2, not exact", "2, another seed"


@dataclass(frozen=True)
class _Result:
    """Losses by step, the last accuracy, and a digest of the last weights."""

    losses: Losses
    knn_top1: float
    weights: str


def main() -> None:
    """Run, print and, with --picture, draw."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=120, help="of each run")
    parser.add_argument("--picture", type=Path, help="a PNG of the losses")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="of the runs")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="diptych-") as folder:
        _write_images(Path(folder))
        results = _results(Path(folder), given.steps, given.workers)
    _print(results)
    if given.picture:
        _draw({name: result.losses for name, result in results.items()}, given.picture)
    exact = [result for name, result in results.items() if name not in (_ROUNDED, _SEED)]
    if len({(result.losses.tobytes(), result.weights, result.knn_top1) for result in exact}) > 1:
        sys.exit("the exact runs differ")


def _write_images(folder: Path) -> None:
    for part, count, held_out in (("train", _IMAGES, False), ("test", _TEST_IMAGES, True)):
        images = scattered_digits(count, held_out=held_out, seed=0)
        write_shards(images, str(folder / part), rows_per_shard=512, rows_per_group=128)


def _config(folder: Path, steps: int, workers: int, name: str, **fields: Any) -> TrainConfig:
    values = tomllib.loads(shipped_config("demo").read_text())
    values["data"] |= {"train": str(folder / "train"), "test": str(folder / "test")}
    values |= {"steps": steps, "workers": workers, "name": name, "output": str(folder / "runs")}
    values |= {"exact": True, **fields}
    values["evaluation"] |= {"every_epochs": 0}
    values["checkpoint"] = {"every_steps": max(1, steps // 10)}
    return TrainConfig(**values)


def _results(folder: Path, steps: int, counts: list[int]) -> dict[str, _Result]:
    """The result of each run, by its workers."""
    configs = {str(workers): _config(folder, steps, workers, f"workers-{workers}") for workers in counts}
    others = {
        _ROUNDED: _config(folder, steps, 2, "rounded", exact=False),
        _SEED: _config(folder, steps, 2, "seed", seed=1),
    }
    with cluster(cpus=8):
        for config in (*configs.values(), *others.values()):
            run_training(config)
    configs[_KILLED] = _killed(folder, steps)
    return {name: _result(config) for name, config in (configs | others).items()}


def _result(config: TrainConfig) -> _Result:
    run = f"{config.output}/{config.name}"
    lines, saved = read_metrics(run), Checkpoints(run, keep=1).latest()
    assert saved
    weights = b"".join(value.contiguous().numpy().tobytes() for value in saved["model"].values())
    losses = np.array([line["loss"] for line in lines if "loss" in line])
    accuracies = [line["knn_top1"] for line in lines if "knn_top1" in line]
    return _Result(losses, accuracies[-1], blake2b(weights, digest_size=4).hexdigest())


def _killed(folder: Path, steps: int) -> TrainConfig:
    """The config of a run whose processes are killed, and which is resumed on one worker."""
    config = _config(folder, steps, 4, "killed")
    (folder / "killed.toml").write_text(to_toml(config))
    run = f"{config.output}/{config.name}"
    command = [sys.executable, "-m", "cluster", "train"]
    process = subprocess.Popen([*command, str(folder / "killed.toml")], start_new_session=True)
    while not (Path(run) / "checkpoints" / f"step-{3 * config.checkpoint.every_steps:09}.pt").exists():
        if process.poll() is not None:
            sys.exit("the run ended before it could be killed")
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run([*command, "--resume", run, "--workers", "1"], check=True)
    return config


def _print(results: dict[str, _Result]) -> None:
    reference = next(iter(results.values())).losses
    at = [step for step in (1, 10, 50, 100, len(reference)) if step <= len(reference)]
    print(
        f"{'workers':<18}" + "".join(f"{f'step {step}':>12}" for step in at)
        + f"{'weights':>12}{'at most off':>14}{'kNN':>9}"
    )  # fmt: skip
    for name, result in results.items():
        off = np.abs(result.losses / reference - 1).max()
        print(
            f"{name:<18}" + "".join(f"{result.losses[step - 1]:12.6f}" for step in at)
            + f"{result.weights:>12}{off:14.1e}{result.knn_top1:9.1%}"
        )  # fmt: skip


def _draw(losses: dict[str, Losses], file: Path) -> None:
    """The losses of all runs; the exact ones are one line, drawn over one another."""
    from matplotlib.figure import Figure  # Of the benchmarks' own packages; the numbers need none of them.

    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, (name, values) in enumerate(losses.items()):
        exact = name not in (_ROUNDED, _SEED)
        style = {"linewidth": 9 - 2 * number} if exact else {"linewidth": 1, "linestyle": "--"}
        axes.plot(np.arange(1, len(values) + 1), values, color=f"C{number}", label=name, **style)
    axes.set_ylabel("loss")
    axes.set_xlabel("step")
    axes.legend(frameon=False, title="workers")
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
