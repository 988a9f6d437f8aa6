"""The doctor's self-test passes for real ranks, and not for a collective that is wrong."""

from collections.abc import Callable

import torch
from torch import Tensor

from training.gather import LocalGather, ProcessGroupGather
from training.selftest import all_gather_rate, gradient_error

_CPU = torch.device("cpu")


class _OutOfOrder(ProcessGroupGather):
    """Brings the workers' rows in the wrong order."""

    def rows(self, local: Tensor) -> Tensor:
        return super().rows(local).roll(len(local), dims=0)


class _HalfOfThem(ProcessGroupGather):
    """Loses the rows of all workers but this one, as a broken network would."""

    def rows(self, local: Tensor) -> Tensor:
        return local.detach().repeat(self.world_size, *[1] * (local.ndim - 1))


def _errors() -> list[float]:
    return [gradient_error(gather(), _CPU) for gather in (ProcessGroupGather, _OutOfOrder, _HalfOfThem)]


def _rate() -> float:
    return all_gather_rate(ProcessGroupGather(), _CPU)


def test_gathered_gradients_are_one_process_s_and_wrong_collectives_show(run_ranks: Callable) -> None:
    for right, out_of_order, half in run_ranks(_errors, 2):
        assert right < 1e-12
        assert out_of_order > 1e-2
        assert half > 1e-2


def test_one_worker_alone_is_right() -> None:
    assert gradient_error(LocalGather(), _CPU) < 1e-12


def test_all_gather_moves_bytes(run_ranks: Callable) -> None:
    assert all(1e6 < rate < 1e12 for rate in run_ranks(_rate, 2))
