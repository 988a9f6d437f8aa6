"""The ranks that the other tests rely on."""

import multiprocessing
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks


def _where_am_i() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def _fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ArithmeticError("rank one cannot count")
    dist.all_reduce(torch.ones(1))  # Never ends: rank 1 does not take part.


def test_results_come_by_rank_for_any_world_size(run_ranks: Callable) -> None:
    for world_size in (4, 2, 1):
        assert run_ranks(_where_am_i, world_size) == [(rank, world_size) for rank in range(world_size)]


def test_a_rank_that_fails_fails_the_test_and_stops_the_others() -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed.*rank one cannot count"):
        Ranks().run(_fail_on_rank_one, 2)
    assert set(multiprocessing.active_children()) <= before
