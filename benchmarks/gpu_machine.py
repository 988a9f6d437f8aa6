"""The machine of gpu.py: what is on it, and what its GPU can do at most, by data sheet and as measured."""

import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_report import seconds_each

_PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "ray", "lightly", "open_clip_torch", "numpy")

# Multiply-adds count as two. By NVIDIA for the H100 SXM and the H200, which have one chip: of dense matrices,
# with sums in float32; float32 is without the matrix units.
_DATA_SHEET = {"bfloat16": 989.4e12, "TF32": 494.7e12, "float32": 66.9e12}

_FIELDS = ("utilization.gpu", "utilization.jpeg", "memory.used")


def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # Of one within another.
        return False


def describe(device: torch.device) -> dict[str, Any]:
    """Device, cores, versions and commit; a package that is not there is `absent`."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": _said("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
        **{name: _version(name) for name in _PACKAGES},
    }


def data_sheet_rate(device: torch.device, kind: str) -> float | None:
    """FLOP/s of the matrix units (float32: without them); None of a GPU that is not listed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = "H200" in name or ("H100" in name and "PCIe" not in name and "NVL" not in name)
    return _DATA_SHEET[kind] if known else None


def matrix_rate(device: torch.device, kind: str, *, small: bool) -> float:
    """FLOP/s of a large product of random matrices, the median of five rounds."""
    side = 256 if small else 8192
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    with matrix_precision("high" if kind == "TF32" else "highest"):
        seconds = [seconds_each(lambda: left @ right, device, 0.05) for _ in range(6)]
    return 2 * side**3 / statistics.median(seconds[1:])


@contextmanager
def matrix_precision(name: str) -> Iterator[None]:
    """How float32 matrices are multiplied: `highest`, or in TF32 where it is `high`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Utilisation:
    """What nvidia-smi says twice a second in the meantime: how busy the GPU and its JPEG engines are."""

    def __init__(self) -> None:
        self.medians: dict[str, float | None] = {}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Utilisation":
        if shutil.which("nvidia-smi"):
            query = ["--query-gpu=" + ",".join(_FIELDS), "--format=csv,noheader,nounits", "-lms", "500"]
            self._process = subprocess.Popen(
                ["nvidia-smi", *query], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        self._process.terminate()
        text = self._process.communicate()[0]
        rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
        rows = [row for row in rows if len(row) == len(_FIELDS)]
        for place, name in enumerate(_FIELDS):
            numbers = [float(row[place]) for row in rows if row[place].replace(".", "").isdigit()]
            self.medians[name] = statistics.median(numbers) if numbers else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
