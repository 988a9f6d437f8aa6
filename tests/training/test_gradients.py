"""Micro-batches leave the gradients of the whole batch, on any number of ranks, in less memory."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.config import DataConfig
from pipelines.index import Index
from pipelines.views import Views
from training.config import TrainConfig
from training.gather import LocalGather, ProcessGroupGather
from training.gradients import micro_batches, split, whole_batch
from training.losses import Matching
from training.models.batch_norm import synchronize_batch_norm
from training.models.encoders import Encoder
from training.objective_builder import build_objective
from training.objectives import BYOL, Objective

_LANES, _PARTS = 4, 3
_FIELDS: dict[str, dict[str, Any]] = {
    "simclr": {"projector": {"hidden_dim": 32, "dim": 16}},
    "dcl": {"simclr": {"loss": "dcl"}, "projector": {"hidden_dim": 32, "dim": 16}},
    "byol": {"objective": "byol", "projector": {"hidden_dim": 32, "dim": 16}},
    "byol together": {
        "objective": "byol",
        "byol": {"views_apart": False},
        "projector": {"hidden_dim": 32, "dim": 16},
    },
    "supervised": {"objective": "supervised", "supervised": {"classes": 5}},
}


def _objective(
    name: str, *, encoder: str = "resnet8", norm: bool = False, matching: Matching | None = None
) -> Objective:
    """The objective in float32, its batch norms off unless asked for."""
    gather = ProcessGroupGather() if dist.is_initialized() else LocalGather()
    torch.manual_seed(0)
    config = TrainConfig(data=DataConfig(train="nowhere"), encoder={"name": encoder}, **_FIELDS[name])  # pyright: ignore[reportArgumentType]
    index = Index("nowhere", "folder", None, True)  # pyright: ignore[reportArgumentType]
    objective = build_objective(config, index, gather, matching)
    if norm:
        return synchronize_batch_norm(objective.double(), gather)  # pyright: ignore[reportReturnType]
    for module in objective.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eval()
    return objective


def _views(rows: int = 24, dtype: torch.dtype = torch.float32, count: int = 2) -> Views:
    generator = torch.Generator().manual_seed(3)
    first, noise = torch.randn(2, rows, 3, 16, 16, generator=generator, dtype=dtype)
    return Views((first, first + noise)[:count], torch.arange(rows) % 5, np.arange(rows))


def _gradients(objective: Objective) -> dict[str, Tensor]:
    named = objective.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * max(float(gradient.norm()), 1e-3), name


@pytest.mark.parametrize("name", list(_FIELDS))
def test_gradients_and_loss_are_the_whole_batchs_without_batch_norm(name: str):
    whole, parts = _objective(name), _objective(name)
    views = _views(count=1 if name == "supervised" else 2)
    expected = whole_batch(whole, dtype=torch.float32)(views)
    backward = micro_batches(parts, lanes=_LANES, parts=_PARTS, gather=LocalGather(), dtype=torch.float32)
    assert float(backward(views)) == pytest.approx(float(expected), rel=1e-6)
    _assert_equal(_gradients(parts), _gradients(whole), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_view_matching_is_that_of_the_whole_batch(name: str, dtype: torch.dtype):
    first, _ = _views().images
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0))
    views = replace(_views(), images=(first, first + 0.6 * noise))
    matching = Matching()
    objective = _objective(name, matching=matching)
    if isinstance(objective, BYOL):
        objective.predictor = nn.Identity()  # An untrained predictor's predictions are near to no target.
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        embedded = [F.normalize(rows.double(), dim=1) for rows in objective.embed(views)]
    # BYOL's predictions are held against its targets.
    similarities = torch.cat(embedded[:2]) @ torch.cat(embedded[-2:]).T
    nearest = similarities.fill_diagonal_(-torch.inf).argmax(1)
    expected = float((nearest == torch.arange(48).roll(24)).double().mean())
    assert 0.2 < expected < 0.95
    whole_batch(objective, dtype=dtype)(views)
    # In bfloat16 rounding may decide for a view or two.
    tolerance = 2.5 / 48 if dtype == torch.bfloat16 else 1e-6
    assert matching.take() == pytest.approx(expected, abs=tolerance)
    micro_batches(objective, lanes=_LANES, parts=_PARTS, gather=LocalGather(), dtype=dtype)(views)
    assert matching.take() == pytest.approx(expected, abs=tolerance)


def test_a_micro_batch_is_an_equal_part_of_every_lane():
    pieces = split(_views(), _LANES, _PARTS)
    assert [piece.samples.tolist() for piece in pieces] == [
        [0, 1, 6, 7, 12, 13, 18, 19], [2, 3, 8, 9, 14, 15, 20, 21], [4, 5, 10, 11, 16, 17, 22, 23],
    ]  # fmt: skip
    for piece in pieces:
        assert torch.equal(piece.images[1], _views().images[1][piece.samples])
        assert torch.equal(piece.labels, _views().labels[piece.samples])


class _Noting(Objective):
    """Pixels as embeddings, and a loss that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__(Encoder(nn.Identity(), 1))
        self.scale = nn.Parameter(torch.ones(()))
        self.seen: list[tuple[list[Tensor], Views]] = []

    def embed(self, views: Views) -> list[Tensor]:
        return [self.scale * images.flatten(1) for images in views.images]

    def loss(self, embedded: list[Tensor], views: Views) -> Tensor:
        self.seen.append((embedded, views))
        return torch.cat(embedded).sum()


def test_a_loss_gets_each_embedding_with_its_own_image_label_and_number():
    objective, views = _Noting(), _views()
    micro_batches(objective, lanes=_LANES, parts=_PARTS, gather=LocalGather(), dtype=torch.float32)(views)
    ((embedded, seen),) = objective.seen
    assert sorted(seen.samples.tolist()) == list(range(24))
    assert seen.labels.tolist() == [sample % 5 for sample in seen.samples.tolist()]
    for rows, images, given in zip(embedded, seen.images, views.images, strict=True):
        assert torch.equal(images, given[seen.samples])
        assert torch.equal(rows, images.flatten(1))


def _ranked(name: str) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients and state of a rank that serves its lanes of the batch, with batch norm, in float64."""
    gather = ProcessGroupGather() if dist.is_initialized() else LocalGather()
    rows = torch.arange(24).view(_LANES, -1)[gather.rank :: gather.world_size].reshape(-1)
    whole = _views(dtype=torch.float64)
    mine = Views(tuple(view[rows] for view in whole.images), whole.labels[rows], whole.samples[rows.numpy()])
    objective = _objective(name, norm=True)
    lanes = _LANES // gather.world_size
    backward = micro_batches(objective, lanes=lanes, parts=_PARTS, gather=gather, dtype=torch.float32)
    return float(backward(mine)), _gradients(objective), objective.state_dict()


@pytest.mark.parametrize("name", ["simclr", "dcl", "byol", "byol together"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_leave_the_gradients_and_statistics_of_one_process(
    world_size: int, name: str, run_ranks: Callable
):
    loss, gradients, state = _ranked(name)
    for rank_loss, rank_gradients, rank_state in run_ranks(_ranked, world_size, name):
        assert rank_loss == pytest.approx(loss, rel=1e-9)
        _assert_equal(rank_gradients, gradients, 1e-8)
        for key, value in state.items():
            torch.testing.assert_close(rank_state[key], value, rtol=1e-8, atol=1e-8)


def test_running_statistics_count_each_micro_batch_once():
    found, expected = _objective("simclr", norm=True), _objective("simclr", norm=True)
    views = _views(dtype=torch.float64)
    micro_batches(found, lanes=_LANES, parts=_PARTS, gather=LocalGather(), dtype=torch.float32)(views)
    for piece in split(views, _LANES, _PARTS):
        expected.embed(piece)
    for name, buffer in expected.named_buffers():
        if "running" in name:
            torch.testing.assert_close(found.get_buffer(name), buffer, rtol=1e-12, atol=1e-12)


def test_what_is_dropped_at_random_is_the_same_both_times():
    views = _views(dtype=torch.float64)
    found, expected = (_objective("simclr", norm=True) for _ in range(2))
    for objective in (found, expected):
        objective.encoder.trunk.append(nn.Dropout(0.5))  # pyright: ignore[reportCallIssue]
    torch.manual_seed(7)
    micro_batches(found, lanes=_LANES, parts=_PARTS, gather=LocalGather(), dtype=torch.float32)(views)
    torch.manual_seed(7)
    pieces = split(views, _LANES, _PARTS)
    embedded = [expected.embed(piece) for piece in pieces]
    expected.loss([torch.cat(rows) for rows in zip(*embedded, strict=True)], views).backward()
    _assert_equal(_gradients(found), _gradients(expected), 1e-10)


class _Saved:
    """Bytes that autograd keeps for a backward pass, now and at the most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> "_Kept":
        return _Kept(self, tensor)


class _Kept:
    def __init__(self, saved: _Saved, tensor: Tensor) -> None:
        self._saved, self.tensor, self._bytes = saved, tensor, tensor.nbytes
        saved.now += self._bytes
        saved.most = max(saved.most, saved.now)

    def __del__(self) -> None:
        self._saved.now -= self._bytes


def _most_saved(parts: int) -> int:
    objective, saved = _objective("simclr"), _Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept.tensor):
        if parts == 1:
            whole_batch(objective, dtype=torch.float32)(_views(48))
        else:
            micro_batches(objective, lanes=_LANES, parts=parts, gather=LocalGather(), dtype=torch.float32)(
                _views(48)
            )
    return saved.most


def test_memory_is_that_of_a_micro_batch():
    whole = _most_saved(1)
    assert _most_saved(4) < 0.35 * whole
    assert _most_saved(12) < 0.15 * whole


def test_bfloat16_is_used_where_asked():
    objective = _objective("simclr")
    seen: list[torch.dtype] = []
    objective.encoder.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    for dtype in (torch.bfloat16, torch.float32):
        whole_batch(objective, dtype=dtype)(_views())
        micro_batches(objective, lanes=_LANES, parts=_PARTS, gather=LocalGather(), dtype=dtype)(_views())
    assert seen == [torch.bfloat16] * (1 + 2 * _PARTS) + [torch.float32] * (1 + 2 * _PARTS)
