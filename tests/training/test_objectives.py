"""Objectives against their papers' equations, over real ranks; whole runs of each, stopped and resumed."""

import copy
import io
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from cluster.train import training_index
from pipelines.config import DataConfig
from pipelines.feed import Device, training_views
from pipelines.index import Index, build_index
from pipelines.reader import read_windows
from pipelines.shards import write_shards
from pipelines.views import Views
from training.checkpoint import Checkpoints
from training.config import EncoderConfig, EvaluationConfig, OptimizerConfig, TrainConfig
from training.config.objective import SupervisedConfig
from training.evaluation.evaluator import Sets
from training.gather import LocalGather, ProcessGroupGather
from training.initial import check_initial, load_initial, read_initial
from training.metrics import read_metrics
from training.models.batch_norm import synchronize_batch_norm
from training.models.encoders import build_encoder
from training.objective_builder import build_objective, count_classes
from training.objectives import BYOL, Objective, SimCLR, target_decay
from training.optimizers import LARS, build_optimizer
from training.process import Worker
from training.trainer import make_plan, run_uri, train

_OBJECTIVES: dict[str, dict[str, Any]] = {
    "simclr": {"temperature": 1.0},
    "dcl": {"simclr": {"loss": "dcl"}, "temperature": 1.0},
    "nt-logistic": {"simclr": {"loss": "nt-logistic"}, "temperature": 1.0},
    "margin": {"simclr": {"loss": "margin"}},
    "nt-logistic-semi-hard": {"simclr": {"loss": "nt-logistic-semi-hard"}},
    "margin-semi-hard": {"simclr": {"loss": "margin-semi-hard", "margin": 1.0}},
    "byol": {"objective": "byol", "byol": {"tau_base": 0.9, "predictor_hidden_dim": 24}},
    "byol together": {"objective": "byol", "byol": {"views_apart": False}},
    "supervised": {"objective": "supervised", "supervised": {"classes": 10, "label_smoothing": 0.1}},
    # A user's own: the one in examples/, which ranks find there too, as they load this file.
    "vicreg": {"objective": "vicreg:VICReg", "objective_options": {"dim": 32}},
}
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
_STEPS = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """60 handwritten digits, grey as RGB."""
    digits: Any = load_digits()

    def png(row: int) -> bytes:
        out = io.BytesIO()
        Image.fromarray((digits.images[row] * 15).astype("uint8")).convert("RGB").save(out, "PNG")
        return out.getvalue()

    folder = tmp_path_factory.mktemp("digits")
    rows = ((png(row), int(digits.target[row]), str(row)) for row in range(60))
    write_shards(rows, str(folder), rows_per_shard=60, rows_per_group=15)
    view = {"size": 12, "blur": 0.0}
    return DataConfig(train=str(folder), view=view, window_rows=8)  # pyright: ignore[reportArgumentType]


def _config(name: str, data: DataConfig, output: Path | str = "nowhere") -> TrainConfig:
    fields = dict(_OBJECTIVES[name])
    if name not in ("supervised", "vicreg"):
        fields["projector"] = {"hidden_dim": 32, "dim": 16}
    # Gentle enough that rounding grows by little from step to step.
    optimizer = {"name": "sgd", "learning_rate": 0.001, "scaling": "none", "weight_decay": 1e-4}
    return TrainConfig(
        data=data, output=str(output), batch_size=16, lanes=4, steps=_STEPS, encoder={"name": "resnet8"},
        optimizer=optimizer, evaluation={"diagnostic_images": 0},
        checkpoint={"every_steps": 2, "keep": 9}, **fields,
    )  # fmt: skip


def _views(n: int = 16) -> Views:
    generator = torch.Generator().manual_seed(3)
    first, noise = torch.randn(2, n, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.arange(n) % 10
    return Views((first, first + noise), labels, np.arange(n))


def _share(views: Views, rank: int, world_size: int) -> Views:
    images = tuple(image.chunk(world_size)[rank] for image in views.images)
    samples = np.array_split(views.samples, world_size)[rank]
    return Views(images, views.labels.chunk(world_size)[rank], samples)


def _objective(config: TrainConfig) -> Objective:
    gather = ProcessGroupGather() if dist.is_initialized() else LocalGather()
    torch.manual_seed(0)
    objective = build_objective(config, build_index(config.data.train, config.data), gather).double()
    synchronize_batch_norm(objective, gather)
    return objective


def _trained(config: TrainConfig, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and state after `steps` of SGD on the same 16 images; of one rank, where there are ranks."""
    objective = _objective(config)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model: nn.Module = objective
    if world_size > 1:
        model = DistributedDataParallel(objective, broadcast_buffers=False)
    optimizer = build_optimizer(objective, OptimizerConfig(name="sgd", momentum=0.9))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    losses, views = [], _views()
    if config.objective == "supervised":
        views = replace(views, images=views.images[:1])
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(_share(views, rank, world_size))
        loss.backward()
        optimizer.step()
        objective.after_step(step, steps)
        losses.append(loss.item())
    return losses, objective.state_dict()


@pytest.mark.parametrize("name", _OBJECTIVES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_train_the_weights_and_see_the_losses_of_one_process(
    world_size: int, name: str, data: DataConfig, run_ranks: Callable
) -> None:
    config = _config(name, data)
    losses, expected = _trained(config, 3)
    before = _objective(config).state_dict()
    assert (expected["encoder.trunk.0.weight"] - before["encoder.trunk.0.weight"]).abs().max() > 1e-4
    for rank_losses, state in run_ranks(_trained, world_size, config, 3):
        assert rank_losses == pytest.approx(losses, rel=1e-9)
        assert list(state) == list(expected)
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-8, atol=1e-8)


# deepmind-research, byol/byol_experiment.py: apply_once_fn is called with each view. Together, batch norm's
# statistics are those of both.
@pytest.mark.parametrize("name", ["byol", "byol together"])
def test_byols_loss_is_the_papers_in_both_directions(name: str, data: DataConfig) -> None:
    objective = _objective(_config(name, data))
    assert isinstance(objective, BYOL)
    for parameter in objective.target_encoder.parameters():
        parameter.mul_(0.9)  # The target is another network than the encoder.
    by_hand: Any = copy.deepcopy(objective)
    views = _views()
    loss = objective(views).detach()
    batches = views.images if name == "byol" else [torch.cat(views.images)]
    with torch.no_grad():
        predicted = torch.cat([by_hand.predictor(by_hand.projector(by_hand.encoder(b))) for b in batches])
        target = torch.cat([by_hand.target_projector(by_hand.target_encoder(b)) for b in batches])
    n = len(views.labels)
    expected = sum(
        (2 - 2 * F.cosine_similarity(predicted[i : i + n], target[j : j + n], dim=1)).mean()
        for i, j in ((0, n), (n, 0))
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    # Running statistics take in each batch, of the target's networks too.
    for key, buffer in by_hand.named_buffers():
        torch.testing.assert_close(objective.get_buffer(key), buffer, rtol=1e-12, atol=1e-12)


def test_a_view_apart_does_not_see_the_other(data: DataConfig) -> None:
    views = _views()
    other = replace(views, images=(views.images[0], 3 * views.images[1]))
    for name, same in (("byol", True), ("byol together", False)):
        first, changed = (_objective(_config(name, data)).embed(batch)[0] for batch in (views, other))
        assert torch.equal(first, changed) == same


def test_byols_target_is_a_copy_that_gets_no_gradient_and_moves_by_tau(data: DataConfig) -> None:
    objective = _objective(_config("byol", data))
    assert isinstance(objective, BYOL)
    online = dict([*objective.encoder.named_parameters(), *objective.projector.named_parameters()])
    target = dict(
        [*objective.target_encoder.named_parameters(), *objective.target_projector.named_parameters()]
    )
    assert all(torch.equal(online[key], target[key]) for key in online)
    objective(_views()).backward()
    assert all(parameter.grad is None for parameter in target.values())
    assert all(parameter.grad is not None for parameter in online.values())
    before = copy.deepcopy(target)
    with torch.no_grad():
        for parameter in online.values():
            parameter.add_(1.0)
    objective.after_step(2, 5)
    # Grill et al. 2020, section 3.2, with tau_base = 0.9, k = 2 and K = 5.
    tau = 1 - 0.1 * (math.cos(math.pi * 2 / 5) + 1) / 2
    for key, parameter in target.items():
        torch.testing.assert_close(
            parameter, tau * before[key] + (1 - tau) * online[key], rtol=1e-12, atol=1e-12
        )


def test_byols_target_normalises_by_the_batch_and_keeps_running_statistics_of_its_own(
    data: DataConfig,
) -> None:
    objective = _objective(_config("byol", data))
    assert isinstance(objective, BYOL)
    before = copy.deepcopy(objective.target_encoder.state_dict())
    features = objective.target_encoder(torch.cat(_views().images))
    objective(_views())
    assert features.std() > 0
    key = next(key for key in before if key.endswith("running_mean"))
    moved = objective.target_encoder.state_dict()[key] - before[key]
    torch.testing.assert_close(moved.abs() > 0, torch.ones_like(moved).bool())


def test_tau_rises_from_its_base_to_one() -> None:
    taus = [target_decay(step, 100, base=0.996) for step in range(101)]
    assert taus[0] == pytest.approx(0.996)
    assert taus[50] == pytest.approx(0.998)
    assert taus[100] == 1.0
    assert taus == sorted(taus)


@pytest.mark.parametrize("count", [1, 2])
def test_supervised_loss_is_that_of_all_views_with_smoothed_labels(count: int, data: DataConfig) -> None:
    objective = _objective(_config("supervised", data))
    views = replace(_views(), images=_views().images[:count])
    expected = _smoothed_cross_entropy(objective, torch.cat(views.images), torch.cat([views.labels] * count))
    torch.testing.assert_close(objective(views), expected, rtol=1e-12, atol=0)


def _smoothed_cross_entropy(objective: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Of ten classes, a tenth of the labels' probability being spread over all."""
    smoothed = torch.full((len(labels), 10), 0.1 / 10, dtype=torch.float64)
    smoothed[torch.arange(len(labels)), labels] += 0.9
    logits = objective.classifier(objective.encoder(images))
    return -(smoothed * logits.log_softmax(1)).sum(1).mean()


def test_a_supervised_run_trains_on_one_view_of_each_image_and_passes_over_all_in_an_epoch(
    data: DataConfig, tmp_path: Path
) -> None:
    config = _config("supervised", data, tmp_path)
    _run(config)
    index = build_index(data.train, data)
    plan = make_plan(config, index)
    assert plan.steps_per_epoch == 60 // 16
    windows = plan.windows(range(config.lanes), 0, 1)
    tables = read_windows(index, data, windows)
    (views,) = training_views(
        tables, plan, range(config.lanes), (data.view,), Device(threads=1), start_step=0, stop_step=1
    )
    assert len(views.labels) == 16
    torch.manual_seed(config.seed)
    objective = build_objective(config, index, LocalGather())
    expected = _smoothed_cross_entropy(objective, views.images[0], views.labels)
    assert _losses(config)[0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("label", [-1, 10])
def test_images_without_a_label_that_is_a_class_are_refused(label: int, data: DataConfig) -> None:
    objective, views = _objective(_config("supervised", data)), _views()
    views.labels[3] = label
    with pytest.raises(
        ValueError, match=rf"image 3 has label {label}, not one from 0 to 9.*supervised.classes"
    ):
        objective(views)


def test_classes_are_those_that_folders_name_or_the_config_says(data: DataConfig, tmp_path: Path) -> None:
    for name in ("cat", "dog", "owl"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "image.png")
    folders = build_index(str(tmp_path), DataConfig(train=str(tmp_path)))
    unset = TrainConfig(data=data, objective="supervised")
    assert count_classes(unset, folders) == 3
    assert count_classes(_config("supervised", data), folders) == 10
    parquet = build_index(data.train, data)
    assert count_classes(_config("supervised", data), parquet) == 10
    with pytest.raises(ValueError, match=r"how many classes .* has; set --supervised.classes"):
        count_classes(unset, parquet)
    nameless = DataConfig(train=data.train, label_column="none")
    with pytest.raises(ValueError, match=r"supervised needs labels, and .*parquet has no column 'none' "):
        count_classes(unset, build_index(data.train, nameless))


def test_labels_of_any_size_train_and_are_judged_as_their_numbers_are(
    data: DataConfig, tmp_path: Path
) -> None:
    values = np.array([0, 3, 4, 9, 1000, 1001, 10**6, 10**9, 10**15, 2**62])
    (images,) = (pq.read_table(path) for path in Path(data.train).iterdir())
    (tmp_path / "far").mkdir()
    far = images.set_column(1, "label", pa.array(values[images["label"].to_numpy()]))
    pq.write_table(far, tmp_path / "far" / "0.parquet", row_group_size=15)
    evaluation = EvaluationConfig(held_out=0.5, linear=True, neighbours=5, diagnostic_images=0)
    lines = []
    for train_uri in (data.train, str(tmp_path / "far")):
        config = replace(
            _config("supervised", replace(data, train=train_uri), tmp_path / train_uri[-3:]),
            supervised=SupervisedConfig(label_smoothing=0.1), evaluation=evaluation,
        )  # fmt: skip
        index = training_index(config)
        assert count_classes(config, index) == 10
        worker = Worker(gather=LocalGather(), device=torch.device("cpu"), threads=1, tables=read_windows)
        train(config, Sets.of(config, Index.from_bytes(index.to_bytes()), None), worker, _ignore)
        keys = ("step", "loss", "top1", "knn_top1", "linear_top1")
        lines.append([[line.get(key) for key in keys] for line in read_metrics(run_uri(config))])
    assert lines[0] == lines[1]
    assert any(row[2] and row[2] > 0 for row in lines[1])


def test_an_image_without_a_label_is_refused_where_labels_were_counted(data: DataConfig) -> None:
    index = replace(build_index(data.train, data), label_values=(3, 10**15))
    config = replace(_config("supervised", data), supervised=SupervisedConfig())
    objective, views = build_objective(config, index, LocalGather()).double(), _views(2)
    views.labels[:] = torch.tensor([10**15, -1])
    with pytest.raises(ValueError, match="image 1 has label -1, not one of the 2 that were counted"):
        objective(views)


@pytest.mark.parametrize("name", ["simclr", "byol", "supervised"])
def test_lars_adapts_every_head_but_its_biases_and_batch_norms(name: str, data: DataConfig) -> None:
    objective = _objective(_config(name, data))
    optimizer = build_optimizer(objective, OptimizerConfig(name="lars", weight_decay=0.1))
    assert isinstance(optimizer, LARS)
    names = {id(parameter): key for key, parameter in objective.named_parameters()}
    adapted, others = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [(group["adapt"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (True, 0.1),
        (False, 0),
    ]
    heads = {"simclr": ["projector"], "byol": ["projector", "predictor"], "supervised": ["classifier"]}[name]
    for head in heads:
        for key, module in objective.get_submodule(head).named_modules(prefix=head):
            if isinstance(module, nn.Linear):
                assert f"{key}.weight" in adapted
                assert module.bias is None or f"{key}.bias" in others
            elif isinstance(module, nn.BatchNorm1d):
                assert f"{key}.weight" in others
    assert not [key for key in adapted | others if key.startswith("target")]


def _ignore(_values: dict[str, Any]) -> None:
    pass


def _run(config: TrainConfig) -> None:
    """A whole run in this process, or as the rank that it is."""
    gather = ProcessGroupGather() if dist.is_initialized() else LocalGather()
    worker = Worker(gather=gather, device=torch.device("cpu"), threads=1, tables=read_windows)
    train(config, Sets.of(config, build_index(config.data.train, config.data), None), worker, _ignore)


def _losses(config: TrainConfig) -> list[float]:
    return [line["loss"] for line in read_metrics(run_uri(config)) if "loss" in line]


def _weights(config: TrainConfig) -> dict[str, Tensor]:
    path = Path(run_uri(config), "checkpoints", f"step-{_STEPS:09}.pt")
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize("name", _OBJECTIVES)
def test_a_run_of_any_objective_goes_on_exactly_and_is_the_same_on_two_ranks(
    name: str, data: DataConfig, run_ranks: Callable, tmp_path: Path
) -> None:
    whole, cut, two = (_config(name, data, tmp_path / run) for run in ("whole", "cut", "two"))
    for config in (whole, cut):
        _run(config)
    for checkpoint in Path(run_uri(cut), "checkpoints").iterdir():
        if int(checkpoint.stem.removeprefix("step-")) > 2:
            checkpoint.unlink()
    _run(cut)
    assert len(_losses(whole)) == _STEPS
    assert _losses(cut) == _losses(whole)
    torch.testing.assert_close(_weights(cut), _weights(whole), rtol=0, atol=0)
    run_ranks(_run, 2, two)
    assert _losses(two) == pytest.approx(_losses(whole), rel=1e-4)


def test_simclr_is_the_objective_unless_another_is_named(data: DataConfig) -> None:
    assert isinstance(_objective(TrainConfig(data=data, encoder={"name": "resnet8"})), SimCLR)  # pyright: ignore


_ENCODERS = (
    "resnet8",
    "resnet14",
    "efficientnet-b0",
    "torchvision:squeezenet1_0",
    "torchvision:regnet_y_400mf",
)


@pytest.mark.parametrize("own", _ENCODERS)
def test_initial_weights_that_pass_the_check_are_those_that_load(own: str, tmp_path: Path) -> None:
    weights = build_encoder(EncoderConfig(name=own)).state_dict()
    model = {f"encoder.{name}": tensor for name, tensor in weights.items()}
    saved = {"step": 1, "model": model, "config": {"encoder": {"name": own}}}
    Checkpoints(str(tmp_path), keep=1).write(1, saved)
    checkpoint = str(tmp_path / "checkpoints/step-000000001.pt")
    for name in _ENCODERS:
        config = EncoderConfig(name=name)
        checks = (
            partial(check_initial, config, checkpoint),
            partial(load_initial, build_encoder(config), checkpoint),
        )
        for check in checks:
            fits: AbstractContextManager[Any] = nullcontext()
            expected = fits if name == own else pytest.raises(ValueError, match="does not fit")
            with expected:
                check()


def test_the_check_of_initial_weights_reads_no_values(tmp_path: Path) -> None:
    saved = {"step": 1, "model": {"encoder.a": torch.ones(3)}, "config": {}}
    Checkpoints(str(tmp_path), keep=1).write(1, saved)
    found = read_initial(str(tmp_path / "checkpoints/step-000000001.pt"), device="meta")
    assert (found["model"]["encoder.a"].device.type, found["model"]["encoder.a"].shape) == ("meta", (3,))
