"""A run's result depends on its config alone: the same run on one, two and four workers, and once killed.

    python benchmarks/promise.py    # handwritten digits: 5 minutes on two cores

Trains the demo's config, with gentle steps, on one, two and four workers; once more on two, killed without
warning after a third of the steps and resumed on one; and, to compare, with another seed. Prints their losses
and accuracies, and how far the losses are from those of one worker; --picture draws that. The difference left
is rounding: the order in which floating-point numbers are added. It grows with each step, and faster with a
high learning rate and a low temperature; so it does in plain PyTorch with another number of threads.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # Before torch reads it.

import numpy as np
from jaxtyping import Float

from cluster import cluster, run_training
from cluster.demo import scattered_digits
from pipelines.shards import write_shards
from training import TrainConfig, read_metrics
from training.config import shipped_config
from training.run_folder import to_toml

Losses = Float[np.ndarray, " steps"]

_IMAGES, _TEST_IMAGES = 2048, 1024
_KILLED, _SEED = "2, killed, then 1", "2, another seed"

# Steps in which rounding grows slowly.
_GENTLE = {"name": "sgd", "learning_rate": 0.02, "scaling": "linear", "weight_decay": 1e-4}


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
        runs = _runs(Path(folder), given.steps, given.workers)
    losses = {name: np.array(_having("loss", lines)) for name, lines in runs.items()}
    _print(losses, {name: _having("knn_top1", lines)[-1] for name, lines in runs.items()})
    if given.picture:
        _draw(losses, given.picture)


def _having(key: str, lines: list[dict]) -> list[float]:
    return [line[key] for line in lines if key in line]


def _write_images(folder: Path) -> None:
    for part, count, held_out in (("train", _IMAGES, False), ("test", _TEST_IMAGES, True)):
        images = scattered_digits(count, held_out=held_out, seed=0)
        write_shards(images, str(folder / part), rows_per_shard=512, rows_per_group=128)


def _config(folder: Path, steps: int, workers: int, name: str, seed: int = 0) -> TrainConfig:
    values = tomllib.loads(shipped_config("demo").read_text())
    values["data"] |= {"train": str(folder / "train"), "test": str(folder / "test")}
    values |= {"steps": steps, "workers": workers, "name": name, "output": str(folder / "runs")}
    values |= {"optimizer": _GENTLE, "temperature": 1.0, "seed": seed}
    values["evaluation"] |= {"every_epochs": 0}
    values["checkpoint"] = {"every_steps": max(1, steps // 10)}
    return TrainConfig(**values)


def _runs(folder: Path, steps: int, counts: list[int]) -> dict[str, list[dict]]:
    """The metrics of each run, by its workers."""
    found = {}
    with cluster(cpus=8):
        for workers in counts:
            found[str(workers)] = run_training(_config(folder, steps, workers, f"workers-{workers}"))
        other = run_training(_config(folder, steps, 2, "seed", seed=1))
    found[_KILLED] = _killed(folder, steps)
    found[_SEED] = other
    return found


def _killed(folder: Path, steps: int) -> list[dict]:
    """The metrics of a run whose processes are killed, and which is resumed on one worker."""
    config = _config(folder, steps, 2, "killed")
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
    return read_metrics(run)


def _print(losses: dict[str, Losses], accuracies: dict[str, float]) -> None:
    reference = next(iter(losses.values()))
    at = [step for step in (1, 10, 50, 100, len(reference)) if step <= len(reference)]
    print(
        f"{'workers':<18}"
        + "".join(f"{f'step {step}':>12}" for step in at)
        + f"{'at most off':>14}{'kNN':>9}"
    )
    for name, values in losses.items():
        off = np.abs(values / reference - 1).max()
        print(
            f"{name:<18}" + "".join(f"{values[step - 1]:12.6f}" for step in at)
            + f"{off:14.1e}{accuracies[name]:9.1%}"
        )  # fmt: skip


def _draw(losses: dict[str, Losses], file: Path) -> None:
    """The losses of all runs, and below them their differences from the first run's."""
    from matplotlib.figure import Figure  # Of the benchmarks' own packages; the numbers need none of them.

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    reference = next(iter(losses.values()))
    steps = np.arange(1, len(reference) + 1)
    for number, (name, values) in enumerate(losses.items()):
        style = {"color": f"C{number}", "linewidth": 5 - number, "label": name}
        above.plot(steps, values, **style)
        if number:
            below.semilogy(
                steps, np.maximum(np.abs(values / reference - 1), 1e-9), color=f"C{number}", linewidth=1
            )
    above.set_ylabel("loss")
    above.legend(frameon=False, title="workers")
    below.set_ylabel("difference from\nthe first's, relative")
    below.set_xlabel("step")
    below.set_ylim(1e-9, 1)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
