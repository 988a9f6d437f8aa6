"""NT-Xent, forward and backward: diptych against lightly, pytorch-metric-learning and the full matrix.

    python benchmarks/loss.py    # 256 to 16,384 pairs of 128 numbers, on all cores
    python benchmarks/loss.py --device cuda --pairs 4096 16384 65536

All get the same projections in float32 and give the loss and its gradient at temperature 0.1. They take turns
within a size, each for a third of a second or once, in a process whose idle threads sleep, as those of
diptych's workers do. Prints the time of each, by the clock and of the CPUs, and diptych's share of the
others': medians over the rounds, lowest and highest; and the memory that each takes at its peak above that
before, in a process of its own. One that would need more than half of the free memory, as its need grows from
the size before, is left out.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.pool import Pool

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.comparison import Comparison, add_json_option, spread, write_json
from benchmarks.machine import CORES, add_device_option, chosen_device, describe, finish
from benchmarks.memory import peak, start_peak, status
from training.losses import nt_xent

try:
    from lightly.loss import NTXentLoss
    from pytorch_metric_learning import losses
except ImportError:
    sys.exit("benchmarks/loss.py needs lightly and pytorch-metric-learning; install them with: make bench")

_TEMPERATURE, _DIM, _ROUND_SECONDS = 0.1, 128, 0.3


def _full_matrix(first: Tensor, second: Tensor) -> Tensor:
    """The loss as its formula has it: cross entropy over all similarities. Chen et al. 2020, eq. 1."""
    rows = F.normalize(torch.cat([first, second]), dim=1)
    logits = (rows @ rows.T / _TEMPERATURE).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(rows), device=rows.device).roll(len(first)))


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "diptych": lambda first, second: nt_xent(first, second, temperature=_TEMPERATURE),
    "lightly": NTXentLoss(temperature=_TEMPERATURE),
    "pytorch-metric-learning": losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=_TEMPERATURE)),
    "full matrix": _full_matrix,
}
# The power of the number of pairs with which their memory grows.
_GROWTH = {"diptych": 1, "lightly": 2, "pytorch-metric-learning": 3, "full matrix": 2}


@dataclass(frozen=True)
class _Round:
    seconds: float
    cpu_seconds: float
    loss: float


def _views(pairs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(pairs)
    first, noise = torch.randn(2, pairs, _DIM, generator=generator)
    second = first + noise
    return first.to(device).requires_grad_(), second.to(device).requires_grad_()


def _once(name: str, views: tuple[Tensor, Tensor]) -> float:
    loss = _LOSSES[name](*views)
    torch.autograd.grad(loss, views)
    finish(loss.device)
    return loss.item()


def _round(name: str, views: tuple[Tensor, Tensor]) -> _Round:
    """The means of as many calls as a round has time for, of at least one."""
    clock, cpu, times, loss = time.perf_counter(), time.process_time(), 0, 0.0
    while not times or time.perf_counter() - clock < _ROUND_SECONDS:
        loss, times = _once(name, views), times + 1
    return _Round((time.perf_counter() - clock) / times, (time.process_time() - cpu) / times, loss)


def _peak_bytes(name: str, pairs: int, device: torch.device) -> int:
    """Memory at the peak of one forward and backward, above that before."""
    torch.set_num_threads(CORES)
    _once(name, _views(8, device))  # Memory that libraries take at first use does not count.
    views = _views(pairs, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _once(name, views)
        return torch.cuda.max_memory_allocated(device) - before
    before = start_peak()
    _once(name, views)
    return peak() - before


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return status("MemAvailable", "/proc/meminfo")


def _peaks(pool: Pool, sizes: list[int], device: torch.device) -> dict[int, dict[str, int]]:
    """Each loss's memory by the number of pairs, without those that need too much."""
    found: dict[int, dict[str, int]] = {}
    last: dict[str, tuple[int, int]] = {}
    for pairs in sizes:
        found[pairs] = {}
        for name, growth in _GROWTH.items():
            if name in last:
                before, fewer = last[name]
                expected = before * (pairs / fewer) ** growth
                if expected > _free_bytes(device) / 2:
                    print(f"{name}, {pairs:,} pairs: left out, needs about {expected / 1e9:,.0f} GB")
                    continue
            found[pairs][name] = pool.apply(_peak_bytes, (name, pairs, device))
            last[name] = found[pairs][name], pairs
    return found


def _measure(pairs: int, names: list[str], rounds: int, device: torch.device) -> dict[str, list[_Round]]:
    torch.set_num_threads(CORES)
    views = _views(pairs, device)
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
    add_device_option(parser)
    add_json_option(parser)
    arguments = parser.parse_args()
    device = chosen_device(arguments.device)
    # Before the processes that measure load torch: threads that spin while they wait take other work's cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    print(describe(device, "torch", "lightly", "pytorch-metric-learning"))
    comparisons = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for pairs, peaks in _peaks(pool, sorted(arguments.pairs), device).items():
            print(f"{pairs:,} pairs, {arguments.rounds} rounds", flush=True)
            found = pool.apply(_measure, (pairs, list(peaks), arguments.rounds, device))
            comparisons += _compare(pairs, found, peaks)
    write_json(arguments.json, comparisons)


if __name__ == "__main__":
    main()
