"""Kernels that give the same bits each time, and the kind of machine that these bits depend on."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from training.gather import Gather

# Kernels divide their sums among threads: as many on every worker, whatever cores it has.
_THREADS = 1

# cuBLAS gives the same bits each time only with a workspace of a fixed size.
_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

Kind = Mapping[str, str]


@contextmanager
def deterministic(*, exact: bool, device: torch.device) -> Iterator[None]:
    """Where `exact`, run torch's kernels in one thread and, on a GPU, only deterministic ones.

    Raises ValueError where a network needs one that torch does not have.
    """
    if not exact:
        yield
        return
    threads, tuned = torch.get_num_threads(), torch.backends.cudnn.benchmark
    before = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(_THREADS)
    if device.type == "cuda":
        os.environ.setdefault(*_WORKSPACE)
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        reason = str(error).partition(",")[0]
        raise ValueError(
            f"exact=true: {reason}; choose another encoder, or train on CPUs with --gpus-per-worker 0"
        ) from error
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = tuned
        torch.use_deterministic_algorithms(before)


def kind_of_machine(device: torch.device) -> dict[str, str]:
    """Hardware and versions of libraries that the bits of a step on `device` depend on, by name."""
    kind = {
        "CPU": _cpu(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "torchvision": version("torchvision"),
        "DALI": version("nvidia-dali-cuda130"),
    }
    if device.type != "cuda":
        return kind
    return kind | {
        "GPU": torch.cuda.get_device_name(device),
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
    }


@cache
def _cpu() -> str:
    """Model of this machine's CPU, or its architecture where Linux does not say."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    names = (value.strip() for key, _, value in lines if key.strip() == "model name")
    return next(names, os.uname().machine)


def kind_differences(one: Kind, other: Kind) -> list[str]:
    """The differences between two kinds of machines, as `CPU A and B`."""
    return [
        f"{name} {one.get(name, 'none')} and {other.get(name, 'none')}"
        for name in {**one, **other}
        if one.get(name) != other.get(name)
    ]


def kind_warnings(gather: Gather, device: torch.device, saved: Kind | None) -> list[str]:
    """Warnings where the bits of an exact run may depend on its machines; the same on all workers.

    saved: the kind that wrote the checkpoint which the run resumes from. Every worker calls it.
    """
    mine = kind_of_machine(device)
    line = torch.tensor(list(f"{json.dumps(mine)}\n".encode()), dtype=torch.uint8, device=device)
    first, *others = map(json.loads, bytes(gather.uneven_rows(line).tolist()).splitlines())
    warnings = []
    if differing := sorted({part for other in others for part in kind_differences(first, other)}):
        warnings.append(
            f"exact=true, but the workers' machines differ: {'; '.join(differing)}; other bits are possible "
            "on another number of workers. See diptych doctor"
        )
    if saved and (differing := kind_differences(saved, first)):
        warnings.append(
            "exact=true, but the run was saved on another kind of machine and may end with other bits: "
            f"{'; '.join(differing)}"
        )
    return warnings
