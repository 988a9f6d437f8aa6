"""A step's time is told by stage, each second once."""

import time

import torch

from training.gather import LocalGather
from training.step_timer import StepTimer, TimedGather


def test_a_stage_within_another_counts_as_itself_alone() -> None:
    timer = StepTimer()
    started = time.perf_counter()
    with timer("forward"):
        time.sleep(0.02)
        with timer("gather"):
            time.sleep(0.03)
        time.sleep(0.02)
    time.sleep(0.05)  # Belongs to none.
    with timer("backward"):
        time.sleep(0.01)
    whole = time.perf_counter() - started
    spent = timer.take()
    assert list(spent) == ["forward_seconds", "gather_seconds", "backward_seconds"]
    assert spent["forward_seconds"] >= 0.04
    assert spent["gather_seconds"] >= 0.03
    assert spent["backward_seconds"] >= 0.01
    assert sum(spent.values()) <= whole - 0.05 + 1e-5
    assert timer.take() == {}


def test_what_is_gathered_is_the_same_and_its_time_counted() -> None:
    timer = StepTimer()
    gather = TimedGather(LocalGather(), timer)
    rows = torch.arange(6.0).view(3, 2)
    for call in (gather.rows, gather.uneven_rows, gather.total):
        assert torch.equal(call(rows), rows)
    assert (gather.rank, gather.world_size) == (0, 1)
    assert list(timer.take()) == ["gather_seconds"]
