"""Real steps on a core for each worker, and what the model expects of them."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.scale_model import Curve, Expected, Link, Pieces, Traffic, expected
from benchmarks.scale_pieces import Trainer, count_here, on_ranks, views_of
from pipelines.sources import Index
from pipelines.views import Views
from training.config import TrainConfig
from training.gather import Gather, LocalGather, ProcessGroupGather
from training.losses import nt_xent
from training.objective_config import temperature

# Bytes of a message that takes as long as any, and of one whose bytes take long.
_SMALL, _LARGE = 1 << 10, 1 << 24

# Steps of which a round takes the fastest.
_STEPS = 4


@dataclass(frozen=True)
class Round:
    """Seconds of real steps, one after the other: of a worker alone, and of one of several without a network.

    pair: what a pair of rows costs NT-Xent, forward and backward. whole: a step of one worker with the whole
    batch. halves: one of two workers with half of it each, over the `link` between them.
    """

    alone: Curve
    among: Curve
    pair: float
    link: Link
    whole: float
    halves: float


class _Echo:
    """Several workers without a network: all others bring what this one does."""

    rank = 0

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def rows(self, local: Tensor) -> Tensor:
        return local.detach().repeat(self.world_size, *repeat(1, local.dim() - 1))

    uneven_rows = rows

    def total(self, local: Tensor) -> Tensor:
        return local.detach() * self.world_size


def measure(config: TrainConfig, index: Index, *, batch: int, rounds: int) -> tuple[Traffic, list[Round]]:
    """What each of two workers brings to a step's collectives, and real steps of both, a core for each.

    Both are at work at all times, as on a machine in full use. A time is that of the fastest of a few steps,
    since others may be at work on the machine too.
    """
    return on_ranks(_measure, config, index, batch, rounds)


def fastest(rounds: list[Round]) -> Round:
    """The fastest of all rounds, time by time."""
    return Round(
        alone=_fastest_curve([each.alone for each in rounds]),
        among=_fastest_curve([each.among for each in rounds]),
        pair=min(each.pair for each in rounds),
        link=Link(min(each.link.latency for each in rounds), max(each.link.rate for each in rounds)),
        whole=min(each.whole for each in rounds),
        halves=min(each.halves for each in rounds),
    )


def _fastest_curve(curves: list[Curve]) -> Curve:
    points = zip(*(curve.points for curve in curves), strict=True)
    return Curve(tuple((same[0][0], min(seconds for _, seconds in same)) for same in points))


def print_validity(traffic: Traffic, rounds: list[Round], batch: int) -> None:
    """What the model expects of the steps of one and of two workers here, and what they took."""
    best = fastest(rounds)
    print(
        f"\nSteps of {batch} images here, a core for each worker, of {len(rounds)} rounds the fastest; link "
        f"{1e6 * best.link.latency:,.0f} us, {8e-9 * best.link.rate:.1f} Gbit/s"
    )
    for workers in (1, 2):
        step, took, ratio = _held_against(traffic, best, batch, workers)
        ratios = [_held_against(traffic, each, batch, workers)[2] for each in rounds]
        print(
            f"  {workers} workers: expected {1e3 * step.seconds:.0f} ms, {step.communication:.1%} of it "
            f"communication; measured {1e3 * took:.0f} ms; measured / expected {ratio:.2f}, by rounds "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def _held_against(traffic: Traffic, each: Round, batch: int, workers: int) -> tuple[Expected, float, float]:
    """What is expected, what was measured, and how much more that is."""
    pieces = Pieces(0, 0, traffic, each.alone, each.among, each.pair)
    step = expected(pieces, each.link, workers=workers, batch_size=batch, view_cores=math.inf, excess=0)
    took = each.whole if workers == 1 else each.halves
    return step, took, took / step.seconds


def _measure(config: TrainConfig, index: Index, batch: int, rounds: int) -> tuple[Traffic, list[Round]]:
    traffic = count_here(config, index)
    views, local, gather, echo = views_of(config, index, batch), LocalGather(), ProcessGroupGather(), _Echo(2)
    trainers = {
        "alone": Trainer(config, index, local, local),
        "among": Trainer(config, index, echo, echo),
        "halves": Trainer(config, index, gather, gather).distribute(),
    }
    parts = {images: _part(views, images) for images in (batch // 4, batch // 2, batch)}

    def seconds(name: str, images: int) -> float:
        dist.barrier()
        return min(trainers[name].seconds(parts[images], _STEPS))

    def once() -> Round:
        alone, among = (
            Curve(tuple((images, seconds(name, images)) for images in parts if images < batch))
            for name in ("alone", "among")
        )
        whole, halves = seconds("alone", batch), seconds("halves", batch // 2)
        return Round(alone, among, pair_seconds(config), _link(gather), whole, halves)

    return traffic, [once() for _ in range(rounds)]


def _part(views: Views, images: int) -> Views:
    tensors = (view[:images].contiguous(memory_format=torch.channels_last) for view in views.images)
    return replace(views, images=tuple(tensors), labels=views.labels[:images], samples=views.samples[:images])


def pair_seconds(config: TrainConfig) -> float:
    """Seconds that NT-Xent takes for a row of this worker and one of any other's."""
    rows, few, many = 128, 4, 36
    first, second = torch.randn(2, rows // 2, config.projector.dim or 128).requires_grad_()

    def once(workers: int) -> None:
        loss = nt_xent(first, second, temperature=temperature(config.temperature), gather=_Echo(workers))
        loss.backward()

    seconds = {workers: _clock(lambda workers=workers: once(workers), 9) for workers in (few, many)}
    return (seconds[many] - seconds[few]) / (rows * rows * (many - few))


def _link(gather: Gather) -> Link:
    small, large = torch.zeros(_SMALL // 4), torch.zeros(_LARGE // 4)
    latency = _clock(lambda: gather.rows(small), 200)
    # A sum over two workers sends its bytes once, and is told after two messages.
    seconds = _clock(lambda: gather.total(large), 9)
    return Link(latency, _LARGE / (seconds - 2 * latency))


def _clock(work: Callable[[], Any], times: int) -> float:
    """The median's seconds, after a first call."""
    work()
    spent = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)
