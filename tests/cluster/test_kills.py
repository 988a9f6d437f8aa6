"""Each kind of process of a run is killed at random moments: it ends with an undisturbed run's weights."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import offspring, running

from cluster.digits import scattered_digits
from pipelines.shards import write_shards

pytestmark = [pytest.mark.ray, pytest.mark.slow]

_SEED, _EVERY = 19, 5

# What is in the titles of each kind of process.
_KINDS = {
    "worker": "ray::RayTrainWorker",
    "controller": "ray::TrainController",
    "channel": "ray::_Channel",
    "reader": "ray::IDLE",  # One that has been, and waits for its next window.
    "agent": "Agent",  # The dashboard's, and that for environments: the raylet ends with either.
    "raylet": "raylet/raylet",
    "head": "gcs_server",
    "driver": "",
}

# A round begins this many steps after the one before it: the run is not over before the last.
_STEPS_PER_ROUND = 2 * _EVERY
_STEPS = (len(_KINDS) + 1) * _STEPS_PER_ROUND

# With these the command ends, and says how to resume.
_ENDING = ("agent", "raylet", "head", "driver")

_ORPHAN_SECONDS = 10


class _Command:
    """`diptych train` with a cluster of its own, started again where that or it is killed."""

    def __init__(self, images: Path, output: Path) -> None:
        self.run, self._log = output / "run", output / "log"
        self._arguments = (
            ["train", "--data.train", str(images), "--output", str(output), "--workers", "2"]
            + ["--data.recipe", "simclr-cifar", "--data.window-rows", "24", "--encoder.name", "resnet8"]
            + ["--projector.hidden-dim", "64", "--projector.dim", "32", "--temperature", "1.0"]
            + ["--batch-size", "64", "--lanes", "4", "--steps", str(_STEPS), "--timeout", "60"]
            + ["--checkpoint.every-steps", str(_EVERY), "--evaluation.diagnostic-images", "0"]
            + ["--optimizer.name", "sgd", "--optimizer.learning-rate", "0.02", "--retries", "10"]
        )
        self.start()

    def start(self) -> None:
        self._read = len(self.said) if self._log.exists() else 0
        command = [sys.executable, "-m", "cluster", *self._arguments]
        with self._log.open("ab") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def reach(self, step: int) -> None:
        """Wait for the checkpoint of the step."""
        deadline = time.monotonic() + 180
        while not any(int(path.stem[5:]) >= step for path in self.run.glob("checkpoints/step-*.pt")):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def kill(self, kind: str, which: random.Random) -> None:
        """Kill one process of the kind; those that it leaves behind have ended soon."""
        tree = offspring(self.process.pid)
        found = [one for one, title in tree.items() if _KINDS[kind] in title]
        if kind == "driver":
            found = [self.process.pid]
        assert found, f"there is no {kind} among {tree}"
        os.kill(victim := which.choice(found), signal.SIGKILL)
        if kind in (*_ENDING, "controller"):
            _assert_ended(tree, victim, kind)
        if kind in _ENDING:
            assert self.process.wait() != 0
            self._assert_told()
            self.start()

    def _assert_told(self) -> None:
        """The way to resume is said, at the latest a moment after the command's end."""
        deadline = time.monotonic() + _ORPHAN_SECONDS
        told = f"resume with: diptych train --resume {self.run}\n"
        while told not in (said := self.said[self._read :]):  # Ray may log something behind it.
            assert time.monotonic() < deadline, said
            time.sleep(0.1)


def _assert_ended(tree: dict[int, str], victim: int, kind: str) -> None:
    """Those of the processes that are nobody's any more."""
    orphans = {one: title for one, title in tree.items() if one != victim}
    if kind == "controller":  # The cluster stays.
        orphans = {one: title for one, title in orphans.items() if "RayTrainWorker" in title}
    deadline = time.monotonic() + _ORPHAN_SECONDS
    while left := running(orphans):
        assert time.monotonic() < deadline, [orphans[one] for one in left]
        time.sleep(0.1)


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"step-{_STEPS:09}.pt", weights_only=True)["model"]


def test_a_run_of_which_everything_is_killed_ends_bit_for_bit_as_an_undisturbed_one(tmp_path: Path) -> None:
    rows = scattered_digits(400, held_out=False, seed=4)
    write_shards(rows, str(tmp_path / "images"), rows_per_shard=100, rows_per_group=50)
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "disturbed").mkdir()
    undisturbed = _Command(tmp_path / "images", tmp_path / "undisturbed")
    assert undisturbed.process.wait(900) == 0, undisturbed.said

    chance = random.Random(_SEED)
    kinds = chance.sample(list(_KINDS), len(_KINDS))
    disturbed = _Command(tmp_path / "images", tmp_path / "disturbed")
    for number, kind in enumerate(kinds):
        disturbed.reach(1 + number * _STEPS_PER_ROUND)
        time.sleep(chance.uniform(0, 1))
        disturbed.kill(kind, chance)
    assert disturbed.process.wait(900) == 0, disturbed.said
    for key, value in _weights(undisturbed.run).items():
        assert torch.equal(_weights(disturbed.run)[key], value), key
