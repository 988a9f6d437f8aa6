"""Exact runs on real ranks: the same bits of weights and losses on any number of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from exact_steps import STEPS, Steps, noise, plain_objective, steps_config, trained
from small_digits import write_small_digits
from torch import Tensor, nn

from pipelines.config import RECIPES, DataConfig
from pipelines.index import build_index
from pipelines.reader import read_windows
from training.checkpoint import Checkpoints
from training.config import TrainConfig, worker_counts
from training.evaluation.evaluator import Sets
from training.gather import LocalGather, ProcessGroupGather
from training.metrics import read_metrics
from training.models.exact import Lanes, exact_lanes, make_exact, tree_sum
from training.process import Worker
from training.trainer import run_uri, train

_SGD = {"name": "sgd", "learning_rate": 3.0}
_ADAMW = {"name": "adamw", "learning_rate": 0.3}
_PROJECTOR = {"projector": {"hidden_dim": 32, "dim": 16}}
_BYOL = {"objective": "byol", "byol": {"predictor_hidden_dim": 24}, **_PROJECTOR}
_SUPERVISED = {"objective": "supervised", "supervised": {"classes": 10}}
_MICRO = {"batch_size": 16, "micro_batch_size": 8}


def _simclr(**fields: Any) -> dict[str, Any]:
    return {**_PROJECTOR, **fields}


def _encoder(name: str, **fields: Any) -> dict[str, Any]:
    return {"encoder": {"name": name, **fields}}


# Steep enough that rounding, were there any, would grow.
_ROWS: dict[str, dict[str, Any]] = {
    "simclr, average": _simclr(optimizer={**_SGD, "average_decay": 0.5}),
    "simclr, lars": _simclr(**_encoder("resnet14"), optimizer={"name": "lars"}),
    "simclr, plain": _simclr(**_encoder("plain8")),
    "simclr, efficientnet, adamw": _simclr(**_encoder("efficientnet-b0"), optimizer=_ADAMW),
    "simclr, mobilenet": _simclr(**_encoder("torchvision:mobilenet_v3_small")),
    "simclr, squeezenet": _simclr(**_encoder("torchvision:squeezenet1_1")),
    "simclr, clipped": _simclr(optimizer={**_SGD, "clip_norm": 0.5}),
    "simclr, micro-batches": _simclr(**_MICRO),
    "dcl": _simclr(simclr={"loss": "dcl"}),
    "nt-logistic": _simclr(simclr={"loss": "nt-logistic"}),
    "nt-logistic-semi-hard": _simclr(simclr={"loss": "nt-logistic-semi-hard"}),
    "margin": _simclr(simclr={"loss": "margin"}),
    "margin-semi-hard": _simclr(simclr={"loss": "margin-semi-hard", "margin": 1.0}),
    "byol": _BYOL,
    "byol, together": _BYOL | {"byol": {"predictor_hidden_dim": 24, "views_apart": False}},
    "byol, micro-batches": {**_BYOL, **_MICRO},
    "supervised": _SUPERVISED,
    "supervised, an image a lane": {**_SUPERVISED, "batch_size": 4},
}


def _row(name: str) -> TrainConfig:
    size = 32 if "torchvision" in str(_ROWS[name]) else 17
    return steps_config(size, **{"optimizer": _SGD, **_ROWS[name]})


@pytest.fixture(scope="module")
def alone() -> dict[str, Steps]:
    """The steps of a single process."""
    return trained({name: _row(name) for name in _ROWS})


def test_the_tree_adds_up_as_by_hand_and_workers_lanes_are_its_branches() -> None:
    a, b, c, d, e, f, g, h = lanes = list(torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)))
    expected = ((a + e) + (c + g)) + ((b + f) + (d + h))
    assert not torch.equal(expected, a + b + c + d + e + f + g + h)
    for workers in (1, 2, 4, 8):
        assert torch.equal(tree_sum([tree_sum(lanes[rank::workers]) for rank in range(workers)]), expected)


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_step_has_the_same_bits_on_any_number_of_ranks(
    world_size: int, alone: dict[str, Steps], run_ranks: Callable
) -> None:
    assert all(len({digest for _, digest in steps}) == STEPS for steps in alone.values())
    for rank, found in enumerate(run_ranks(trained, world_size, {name: _row(name) for name in _ROWS})):
        differing = [name for name in _ROWS if found[name] != alone[name]]
        assert not differing, f"rank {rank} of {world_size}"


@pytest.mark.parametrize("name", ["simclr, efficientnet, adamw", "simclr, squeezenet", "byol", "supervised"])
def test_loss_gradients_and_statistics_are_plain_pytorchs_but_for_rounding(name: str) -> None:
    config = _row(name)
    plain, exact = (plain_objective(config).double() for _ in range(2))
    make_exact(exact, exact_lanes(config, LocalGather()))
    views = noise(config, LocalGather(), 0)
    views = replace(views, images=tuple(image.double() for image in views.images))
    losses = [model(views) for model in (plain, exact)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    for loss in losses:
        loss.backward()
    expected = {key: weight.grad for key, weight in plain.named_parameters()}
    largest = max(grad.abs().max().item() for grad in expected.values() if grad is not None)
    for key, weight in exact.named_parameters():
        # A bias before a batch norm has a gradient of 0, of which only rounding is left.
        torch.testing.assert_close(weight.grad, expected[key], rtol=1e-9, atol=1e-12 * largest, msg=key)
    for (key, ours), (_, theirs) in zip(exact.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=key)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("digits")
    write_small_digits(folder, 96)
    view = replace(RECIPES["simclr-cifar"][0], size=17)
    return DataConfig(train=str(folder / "train"), test=str(folder / "test"), view=view, window_rows=12)


def _config(data: DataConfig, **fields: Any) -> TrainConfig:
    return steps_config(17, **{"data": data, **fields})


def _train(config: TrainConfig, until: int | None = None) -> None:
    """Train in this process, or as the rank that it is."""
    gather = ProcessGroupGather() if dist.is_initialized() else LocalGather()
    worker = Worker(gather=gather, device=torch.device("cpu"), threads=1, tables=read_windows)
    index, test = (build_index(uri, config.data) for uri in (config.data.train, config.data.test or ""))
    train(config, Sets.of(config, index, test), worker, lambda _values: None, until=until)


_MEASURED = ("loss", "view_matching", "knn_top1", "linear_top1", "alignment", "uniformity", "effective_rank")


def _measured(config: TrainConfig) -> list[tuple[int, dict[str, float]]]:
    """The steps and evaluations in metrics.jsonl, without times."""
    lines = read_metrics(run_uri(config))
    assert not [line for line in lines if "exact" in line.get("warning", "")]
    chosen = [(line["step"], {key: line[key] for key in _MEASURED if key in line}) for line in lines]
    return [(step, values) for step, values in chosen if values]


def _tensors(saved: Any) -> list[Tensor]:
    """All tensors in a checkpoint, in order."""
    if isinstance(saved, Tensor):
        return [saved]
    parts = saved.values() if isinstance(saved, dict) else saved if isinstance(saved, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def test_a_run_resumed_on_other_numbers_of_ranks_has_the_same_checkpoints_and_metrics(
    data: DataConfig, tmp_path: Path, run_ranks: Callable
) -> None:
    settings = {"name": "adamw", "learning_rate": 0.3, "average_decay": 0.5}
    evaluation = {
        "neighbours": 5, "diagnostic_images": 20, "held_out": 0.2, "every_epochs": 1, "linear": True,
    }  # fmt: skip
    alone = _config(
        data, output=str(tmp_path / "alone"), **_PROJECTOR, steps=12, optimizer=settings,
        evaluation=evaluation, checkpoint={"every_steps": 3, "keep": 9},
    )  # fmt: skip
    config = replace(alone, output=str(tmp_path / "ranks"))
    _train(alone)
    run_ranks(_train, 2, config, 4)
    run_ranks(_train, 4, config, 7)
    _train(config, 9)
    run_ranks(_train, 2, config)
    assert _measured(config) == _measured(alone)
    for step in (3, 6, 9, 12):
        ours, theirs = (_tensors(Checkpoints(run_uri(of), 9).load(step)) for of in (config, alone))
        assert len(ours) == len(theirs) > 60
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True)), step


def test_threads_are_the_callers_own_again_after_a_run(data: DataConfig, tmp_path: Path) -> None:
    config = _config(data, output=str(tmp_path), **_PROJECTOR, steps=1, evaluation={"diagnostic_images": 0})
    torch.set_num_threads(2)
    try:
        _train(config)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("workers", [3, 6, 8])
def test_other_numbers_of_workers_are_refused_with_those_that_fit(workers: int, data: DataConfig) -> None:
    config = _config(data, lanes=12, batch_size=24, workers=workers)
    with pytest.raises(ValueError, match=rf"divides lanes=12, not workers={workers}; try one of 1, 2, 4$"):
        worker_counts(config)
    assert worker_counts(replace(config, workers="2:12")) == [2, 4]
    with pytest.raises(ValueError, match=r"no power of two in workers=5:12; include one of 1, 2, 4$"):
        worker_counts(replace(config, workers="5:12"))
    assert worker_counts(replace(config, workers=3, exact=False)) == [3]


@pytest.mark.parametrize(
    "fields", [{"compile": True}, {"precision": "bfloat16"}, {"objective": "own:Objective"}]
)
def test_settings_that_cannot_be_exact_are_refused(fields: dict[str, Any], data: DataConfig) -> None:
    with pytest.raises(ValueError, match="exact=true"):
        _config(data, **fields)


class _Scaled(nn.Module):
    """A module with a weight of its own and a batch norm inside."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.norm = nn.Parameter(torch.ones(())), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.norm(x)


@pytest.mark.parametrize(
    "module", [_Scaled(), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, momentum=None)]
)
def test_a_module_that_has_no_exact_form_is_refused_by_name(module: nn.Module) -> None:
    objective = plain_objective(_row("supervised"))
    objective.encoder.trunk = nn.Sequential(module, objective.encoder.trunk)
    with pytest.raises(ValueError, match=rf"exact form of encoder\.trunk\.0, a {type(module).__name__}"):
        make_exact(objective, Lanes(LocalGather(), 4, 2))
