"""The machine of a benchmark: the device that it runs on, versions, and when the device has finished."""

import argparse
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

CORES = os.cpu_count() or 1


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Let the user choose between the CPU and the first GPU."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of all that is compared")


def chosen_device(name: str) -> torch.device:
    """The CPU, with GPUs hidden from this process and those that it starts, or the first GPU.

    Exits where there is no GPU.
    """
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # diptych takes the GPUs that it sees.
        return torch.device("cpu")
    if not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no GPU on this machine; use --device cpu")
    return torch.device("cuda", 0)


def describe(device: torch.device, *packages: str) -> str:
    """Commit, device, cores, Python and the versions of these packages, on one line."""
    here = str(Path(__file__).parent)
    commit = subprocess.run(
        ["git", "-C", here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return (
        f"commit {commit or 'unknown'}, {name}, {CORES} cores, Python {platform.python_version()}, {versions}"
    )


def finish(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
