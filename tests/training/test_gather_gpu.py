"""What NCCL gathers: here of one rank, since one GPU has room for no more."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cluster.doctor.worker_checks import all_gather_rate, gradient_error
from training.gather import LocalGather, ProcessGroupGather
from training.losses import nt_xent

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gather(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessGroupGather]:
    torch.cuda.set_device(0)
    store: Path = tmp_path_factory.mktemp("nccl") / "store"
    dist.init_process_group("nccl", f"file://{store}", rank=0, world_size=1)
    yield ProcessGroupGather()
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_rows_of_one_rank_are_its_own(gather: ProcessGroupGather, dtype: torch.dtype):
    rows = torch.arange(12, device="cuda").view(4, 3).to(dtype)
    assert torch.equal(gather.rows(rows), rows)
    assert torch.equal(gather.rows(rows.T), rows.T)
    assert torch.equal(gather.uneven_rows(rows), rows)
    assert gather.uneven_rows(rows[:0]).shape == (0, 3)
    assert gather.rows(rows).is_cuda


def test_total_of_one_rank_is_its_own(gather: ProcessGroupGather):
    mine = torch.tensor([1.5, 2.5], device="cuda")
    total = gather.total(mine)
    assert torch.equal(total, mine)
    assert total.data_ptr() != mine.data_ptr()


def test_the_loss_over_nccl_is_that_without(gather: ProcessGroupGather):
    torch.manual_seed(0)
    views = torch.randn(2, 300, 128, device="cuda").requires_grad_()
    losses = [nt_xent(*views, temperature=0.1, gather=each) for each in (gather, LocalGather())]
    gradients = [torch.autograd.grad(loss, views)[0] for loss in losses]
    assert torch.equal(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)


def test_distributed_data_parallel_over_nccl_leaves_the_gradient_of_one_process(gather: ProcessGroupGather):
    torch.manual_seed(0)
    images = torch.randn(2, 64, 16, device="cuda")
    encoder = nn.Linear(16, 8).cuda()
    expected = torch.autograd.grad(
        nt_xent(*encoder(images), temperature=0.1), tuple(encoder.parameters())
    )  # fmt: skip
    first, second = DistributedDataParallel(encoder)(images)
    nt_xent(first, second, temperature=0.1, gather=gather).backward()
    for parameter, right in zip(encoder.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, right, rtol=1e-5, atol=1e-8)


def test_the_doctors_self_test_passes(gather: ProcessGroupGather):
    device = torch.device("cuda", 0)
    assert gradient_error(gather, device) < 1e-12
    assert all_gather_rate(gather, device) == 0  # Nothing comes from others.
