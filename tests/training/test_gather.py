"""Rows from every worker, over real ranks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from training.gather import LocalGather, ProcessGroupGather

_COUNTS = [3, 0, 2, 1]


def _gathered() -> dict[str, Any]:
    gather = ProcessGroupGather()
    rank = gather.rank
    rows = torch.arange(6).view(2, 3) + 10 * rank
    return {
        "rows": gather.rows(rows),
        "transposed": gather.rows(rows.double().T),
        "uneven": gather.uneven_rows(torch.full((_COUNTS[rank], 2), float(rank))),
        "labels": gather.uneven_rows(torch.full((_COUNTS[rank],), rank)),
        "none": gather.uneven_rows(torch.zeros(0, 5)),
        "total": gather.total(torch.tensor([1.0, 10.0**rank])),
        "tracked": gather.rows(torch.ones(1, requires_grad=True)).requires_grad,
    }


@pytest.fixture(scope="module")
def gathered(run_ranks: Callable) -> list[dict[str, Any]]:
    return run_ranks(_gathered, 4)


def test_rows_come_in_rank_order_on_every_rank(gathered: list[dict[str, Any]]) -> None:
    expected = [
        [10 * rank + column + 3 * row for column in range(3)] for rank in range(4) for row in range(2)
    ]
    assert all(result["rows"].tolist() == expected for result in gathered)


def test_rows_of_a_transposed_tensor_come_whole(gathered: list[dict[str, Any]]) -> None:
    expected = [[10.0 * rank + column, 10.0 * rank + column + 3] for rank in range(4) for column in range(3)]
    assert all(result["transposed"].tolist() == expected for result in gathered)


def test_uneven_rows_come_in_rank_order_and_a_rank_may_have_none(gathered: list[dict[str, Any]]) -> None:
    ranks = [0, 0, 0, 2, 2, 3]
    assert all(result["uneven"].tolist() == [[rank, rank] for rank in ranks] for result in gathered)
    assert all(result["labels"].tolist() == ranks for result in gathered)


def test_no_rank_need_have_rows(gathered: list[dict[str, Any]]) -> None:
    assert all(result["none"].shape == (0, 5) for result in gathered)


def test_total_is_the_sum_over_ranks(gathered: list[dict[str, Any]]) -> None:
    assert all(result["total"].tolist() == [4.0, 1111.0] for result in gathered)


def test_gathered_rows_carry_no_gradient(gathered: list[dict[str, Any]]) -> None:
    assert not any(result["tracked"] for result in gathered)
    assert not LocalGather().rows(torch.ones(1, requires_grad=True)).requires_grad
