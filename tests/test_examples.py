"""The scripts in examples/ do what they say, each in a process of its own, on one cluster."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import digit_folders
from safetensors.torch import load_file

from training import read_metrics

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ["--size", "32", "--batch-size", "32", "--epochs", "2", "--output", "runs"]

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images in it."""
    folder = tmp_path_factory.mktemp("examples")
    digit_folders(folder / "photos", 160)
    return folder


def run(home: Path, *command: str) -> str:
    """What the script prints, run in `home` on the tests' cluster."""
    import ray

    environment = os.environ | {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "PYTHONPATH": str(EXAMPLES.parent),
    }
    done = subprocess.run(
        [sys.executable, EXAMPLES / command[0], *command[1:]],
        cwd=home, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_folder_becomes_an_encoder_and_its_features_go_into_scikit_learn(
    ray_cluster: None, home: Path
) -> None:
    out = run(home, "own_images.py", "photos", *SMALL, "--encoder", "resnet8", "--name", "first")
    assert len(re.findall(r"kNN accuracy \d+\.\d% ± \d+\.\d on images that were held out", out)) == 2
    assert "an image of 32 x 32 pixels becomes 64 numbers" in out
    weights = load_file(home / "runs" / "first" / "encoder.safetensors")
    assert all(value.isfinite().all() for value in weights.values() if torch.is_floating_point(value))
    out = run(home, "features_to_sklearn.py", "runs/first", "photos")
    assert re.search(r"logistic regression: \d+\.\d% of 160 images", out)
    assert "normalised mutual information" in out


def test_an_objective_of_one_s_own_trains_on_two_workers(ray_cluster: None, home: Path) -> None:
    # That its losses are those of one worker: tests/training/test_objectives.py.
    out = run(home, "own_objective.py", "photos", *SMALL, "--workers", "2", "--name", "vicreg")
    losses = [line["loss"] for line in read_metrics(str(home / "runs" / "vicreg")) if "loss" in line]
    assert [f"step {step}: loss {loss:.6f}" for step, loss in enumerate(losses, 1)] == [
        line for line in out.splitlines() if re.match(r"step \d+: loss ", line)
    ]
    assert len(losses) == 10
    assert (home / "runs" / "vicreg" / "report.html").is_file()
