"""NT-Xent, forward and backward: diptych against lightly and pytorch-metric-learning.

    python benchmarks/loss.py    # 256 to 16,384 pairs of 128 numbers, on all cores

Everyone gets the same projections in float32 and gives the loss and its gradient at temperature 0.1. The
three take turns within a size, each for a third of a second or once, in a process whose idle threads sleep,
as those of diptych's workers do. Prints the time of each, by the clock and of the CPUs, and diptych's share
of the others': medians over the rounds, lowest and highest; and the memory that each takes at its peak above
what its process had before, in a process of its own. A peer that would need more than half of the free
memory, as its need grows from the size before, is left out.
"""

import argparse
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.comparison import Comparison, add_json_option, spread, write_json
from training.losses import nt_xent

try:
    from lightly.loss import NTXentLoss
    from pytorch_metric_learning import losses
except ImportError:
    sys.exit("benchmarks/loss.py needs lightly and pytorch-metric-learning; install them with: make bench")

_TEMPERATURE, _DIM, _ROUND_SECONDS = 0.1, 128, 0.3
_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "diptych": lambda first, second: nt_xent(first, second, temperature=_TEMPERATURE),
    "lightly": NTXentLoss(temperature=_TEMPERATURE),
    "pytorch-metric-learning": losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=_TEMPERATURE)),
}
# With which power of the number of pairs their memory grows.
_GROWTH = {"diptych": 1, "lightly": 2, "pytorch-metric-learning": 3}


@dataclass(frozen=True)
class _Round:
    seconds: float
    cpu_seconds: float
    loss: float


def _views(pairs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(pairs)
    first, noise = torch.randn(2, pairs, _DIM, generator=generator)
    return first.requires_grad_(), (first.detach() + noise).requires_grad_()


def _once(name: str, views: tuple[Tensor, Tensor]) -> float:
    loss = _LOSSES[name](*views)
    torch.autograd.grad(loss, views)
    return loss.item()


def _round(name: str, views: tuple[Tensor, Tensor]) -> _Round:
    """Means over as many times as it takes."""
    clock, cpu, times, loss = time.perf_counter(), time.process_time(), 0, 0.0
    while not times or time.perf_counter() - clock < _ROUND_SECONDS:
        loss, times = _once(name, views), times + 1
    return _Round((time.perf_counter() - clock) / times, (time.process_time() - cpu) / times, loss)


def _peak_bytes(name: str, pairs: int) -> int:
    """Memory at the peak of one forward and backward, above what the process had before."""
    torch.set_num_threads(os.cpu_count() or 1)
    _once(name, _views(8))  # What libraries set up at first use is not the loss's.
    views = _views(pairs)
    Path("/proc/self/clear_refs").write_text("5")  # Start the peak anew.
    before = _status("VmRSS")
    _once(name, views)
    return _status("VmHWM") - before


def _status(key: str, file: str = "/proc/self/status") -> int:
    lines = dict(line.split(":", 1) for line in Path(file).read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def _measure(pairs: int, names: list[str], rounds: int) -> dict[str, list[_Round]]:
    torch.set_num_threads(os.cpu_count() or 1)
    views = _views(pairs)
    found: dict[str, list[_Round]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names:
            measured = _round(name, views)
            if number:  # The first round warms up.
                found[name].append(measured)
    return found


def _compare(pairs: int, found: dict[str, list[_Round]], peaks: dict[str, int]) -> list[Comparison]:
    comparisons, ours = [], found["diptych"]
    for name, rounds in found.items():
        print(f"  {name:<24} {spread([1e3 * each.seconds for each in rounds], ',.1f')} ms, "
              f"CPUs {spread([1e3 * each.cpu_seconds for each in rounds], ',.1f')} ms, "
              f"{peaks[name] / 1e6:,.0f} MB, loss {rounds[0].loss:.6f}")  # fmt: skip
    for name, theirs in found.items():
        if name != "diptych":
            clock = [mine.seconds / other.seconds for mine, other in zip(ours, theirs, strict=True)]
            cpu = [mine.cpu_seconds / other.cpu_seconds for mine, other in zip(ours, theirs, strict=True)]
            print(f"  diptych / {name}: {spread(clock, '.3f')} of its time, CPUs {spread(cpu, '.3f')}")
            times = [[1e3 * each.seconds for each in rounds] for rounds in (ours, theirs)]
            memory = [[peaks[each] / 1e6] for each in ("diptych", name)]
            comparisons += [
                Comparison(f"NT-Xent of {pairs:,} pairs", name, "ms", *times),
                Comparison(f"NT-Xent of {pairs:,} pairs, memory", name, "MB", *memory),
            ]
    return comparisons


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--rounds", type=int, default=5)
    add_json_option(parser)
    arguments = parser.parse_args()
    cores = os.cpu_count() or 1
    # Before the processes that measure load torch: threads that spin while they wait take other work's cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    packages = ("torch", "lightly", "pytorch-metric-learning")
    print(
        f"{cores} cores, Python {platform.python_version()},",
        *(f"{name} {version(name)}" for name in packages),
    )
    comparisons = []
    last: dict[str, tuple[int, int]] = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for pairs in sorted(arguments.pairs):
            print(f"{pairs:,} pairs, {arguments.rounds} rounds")
            peaks: dict[str, int] = {}
            for name, growth in _GROWTH.items():
                if name in last:
                    peak, before = last[name]
                    expected, free = (
                        peak * (pairs / before) ** growth,
                        _status("MemAvailable", "/proc/meminfo"),
                    )
                    if expected > free / 2:
                        print(f"  {name:<24} left out: needs about {expected / 1e9:,.0f} GB")
                        continue
                peaks[name] = pool.apply(_peak_bytes, (name, pairs))
                last[name] = peaks[name], pairs
            found = pool.apply(_measure, (pairs, list(peaks), arguments.rounds))
            comparisons += _compare(pairs, found, peaks)
    write_json(arguments.json, comparisons)


if __name__ == "__main__":
    main()
