"""From the pieces of a step to what a cluster should do: images a second, traffic, and the time of an epoch.

A worker's step is its arithmetic and its part in the step's collectives, one after the other:

- arithmetic: what a step with so many images takes without a network, and what NT-Xent's pairs of its rows
  and the others' add to that as the global batch grows;
- gathers (projections, NT-Xent's sums, batch norm's statistics) go round a ring: workers - 1 hops, on each of
  which a worker passes on what one has brought. Nothing overlaps them;
- reductions (the gradients of those statistics and of the weights) take 2 log2(workers) hops, and a worker
  sends 2 (workers - 1) / workers of their bytes. Those of the weights may overlap the backward pass, two
  thirds of the arithmetic, but for their last bucket: the upper of two rates; the lower is without.

Reading and making views go on beside the step, on cores of their own, and hold it up only where they take
longer; what is read comes over the same link. No worker waits for a slower one, switches between the links
are never full, storage gives what is asked of it, and any batch fits into a worker's memory.
"""

import math
from dataclasses import dataclass

import numpy as np

from pipelines.plan import Plan

_BACKWARD = 2 / 3


@dataclass(frozen=True)
class Collective:
    """What a worker brings to a step's collectives of one kind: how many they are, and their bytes in all."""

    calls: int
    bytes: float


@dataclass(frozen=True)
class Traffic:
    """A step's collectives. `projections` are an image's; the others do not depend on the batch."""

    projections: Collective
    statistics: Collective
    statistics_gradients: Collective
    gradients: Collective


@dataclass(frozen=True)
class Curve:
    """Seconds of a step's arithmetic by a worker's images: straight between the points.

    Below them as between the first two, though not below zero; above them as the last, image by image.
    """

    points: tuple[tuple[int, float], ...]

    def seconds(self, images: float) -> float:
        counts, seconds = zip(*sorted(self.points), strict=True)
        if images >= counts[-1]:
            return seconds[-1] * images / counts[-1]
        slope = (seconds[1] - seconds[0]) / (counts[1] - counts[0])
        fixed = max(0.0, seconds[0] - slope * counts[0])
        return float(np.interp(images, (0, *counts), (fixed, *seconds)))


@dataclass(frozen=True)
class Link:
    """What joins a worker to the others: seconds until a message is there, and bytes a second."""

    latency: float
    rate: float


@dataclass(frozen=True)
class Pieces:
    """What is known of a worker. alone: its steps as the only one; among: as one of several.

    view_seconds: of a core, for both views of an image. pair: seconds of NT-Xent for two rows.
    """

    stored_bytes: float
    view_seconds: float
    traffic: Traffic
    alone: Curve
    among: Curve
    pair: float


@dataclass(frozen=True)
class Expected:
    """A step, in seconds, without and with gradients that are summed during the backward pass.

    Of the latter: communication, which is the share of the step in which nothing else goes on; limit, what
    takes longest. The bytes are one worker's.
    """

    workers: int
    batch_size: int
    seconds: float
    overlapped_seconds: float
    communication: float
    limit: str
    read_bytes: float
    sent_bytes: float


@dataclass(frozen=True)
class Reading:
    """What an epoch reads: its steps, and the rows of whole row groups for each row that is trained on."""

    steps: int
    excess: float


def expected(
    pieces: Pieces, link: Link, *, workers: int, batch_size: int, view_cores: float, excess: float
) -> Expected:
    """A step of the global batch on so many workers."""
    local = batch_size / workers
    arithmetic = _arithmetic(pieces, workers, batch_size)
    traffic = pieces.traffic
    projections = Collective(traffic.projections.calls, traffic.projections.bytes * local)
    gathers = [projections, traffic.statistics]
    always = sum(_ring(gather, workers, link) for gather in gathers)
    always += _reduction(traffic.statistics_gradients, workers, link)
    gradients = _reduction(traffic.gradients, workers, link)
    bucket = Collective(1, traffic.gradients.bytes / traffic.gradients.calls)
    exposed = max(gradients - _BACKWARD * arithmetic, _reduction(bucket, workers, link))
    read = local * pieces.stored_bytes * excess
    sent = (workers - 1) * sum(gather.bytes for gather in gathers)
    sent += _share(workers) * (traffic.statistics_gradients.bytes + traffic.gradients.bytes)
    beside = {"views": local * pieces.view_seconds / view_cores, "link": (read + sent) / link.rate}
    after, during = (arithmetic + always + last for last in (gradients, exposed))
    limits = {"step": during, **beside}
    seconds = max(limits.values())
    communication = (always + exposed) / seconds
    limit = max(limits, key=lambda name: limits[name])
    slower = max(after, *beside.values())
    return Expected(workers, batch_size, slower, seconds, communication, limit, read, sent)


def _arithmetic(pieces: Pieces, workers: int, batch_size: int) -> float:
    local = batch_size / workers
    if workers == 1:
        return pieces.alone.seconds(local)
    # `among` has one other worker's already; each image has two rows.
    strangers = max(0, workers - 2) * local
    return pieces.among.seconds(local) + pieces.pair * 2 * local * 2 * strangers


def _ring(gather: Collective, workers: int, link: Link) -> float:
    return (workers - 1) * (gather.calls * link.latency + gather.bytes / link.rate)


def _reduction(reduction: Collective, workers: int, link: Link) -> float:
    hops = 2 * math.ceil(math.log2(workers))
    return hops * reduction.calls * link.latency + _share(workers) * reduction.bytes / link.rate


def _share(workers: int) -> float:
    return 2 * (workers - 1) / workers


def reading(images: int, *, group_rows: int, lanes: int, batch_size: int, window_rows: int) -> Reading:
    """What the plan of an epoch of so many images, in row groups of `group_rows`, reads."""
    rows = np.full(images // group_rows, group_rows)
    plan = Plan(rows, 0, lanes, batch_size, window_rows)
    windows = plan.windows(range(lanes), 0, plan.steps_per_epoch)
    read = sum(int(rows[piece.fragment]) for window in windows for piece in window.pieces)
    return Reading(plan.steps_per_epoch, read / (plan.steps_per_epoch * batch_size))
