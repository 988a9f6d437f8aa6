"""Whole runs on scikit-learn's digits, without Ray: stopped and resumed, on one, two and four ranks."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from animated import with_deadly
from PIL import Image
from small_digits import small_digits, write_small_digits
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pipelines.config import RECIPES, DataConfig
from pipelines.index import Index, build_index
from pipelines.plan import Window
from pipelines.reader import read_windows
from pipelines.shards import write_shards
from training.checkpoint import Checkpoints
from training.config import TrainConfig
from training.errors import StoppedError
from training.evaluation.evaluator import Sets
from training.evaluation.finetune import load_encoder
from training.gather import LocalGather, ProcessGroupGather
from training.metrics import Progress, read_metrics
from training.objectives import Objective
from training.process import Worker
from training.trainer import make_plan, run_uri, total_steps, train

# 149 images in four lanes make 37 rows a lane, so 6 steps of 24 images an epoch.
_TRAIN_IMAGES, _STEPS, _STEPS_PER_EPOCH = 149, 8, 6

Samples = list[list[int]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("digits")
    write_small_digits(folder, _TRAIN_IMAGES)
    return DataConfig(
        train=str(folder / "train"),
        test=str(folder / "test"),
        view=replace(RECIPES["simclr-cifar"][0], size=16),
        window_rows=12,
    )


def _config(data: DataConfig, output: Path, **fields: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "batch_size": 24,
        "lanes": 4,
        "steps": _STEPS,
        # Gentle enough that rounding grows by little from step to step.
        "temperature": 1.0,
        "encoder": {"name": "resnet8"},
        "projector": {"hidden_dim": 32, "dim": 16},
        "optimizer": {"name": "sgd", "learning_rate": 0.001, "scaling": "none", "weight_decay": 1e-4},
        "evaluation": {"every_epochs": 1, "neighbours": 10, "batch_size": 32},
        "checkpoint": {"every_steps": 2, "keep": 100},
    }
    return TrainConfig(data=data, output=str(output), **{**settings, **fields})


def _ignore(_values: dict[str, Any]) -> None:
    pass


def _train(
    config: TrainConfig, progress: Progress = _ignore, stopping: Callable[[], bool] = lambda: False
) -> Samples:
    """Train in this process, or as the rank that it is; the samples of each step."""
    seen: Samples = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, Objective):
            seen.append(inputs[0].samples.tolist())

    worker = Worker(
        gather=ProcessGroupGather() if dist.is_initialized() else LocalGather(),
        device=torch.device("cpu"),
        threads=1,
        tables=read_windows,
        stopping=stopping,
    )
    index = build_index(config.data.train, config.data)
    test_index = build_index(config.data.test, config.data) if config.data.test else None
    hook = register_module_forward_pre_hook(note)
    try:
        train(config, Sets.of(config, index, test_index), worker, progress)
    finally:
        hook.remove()
    return seen


@pytest.fixture(scope="module")
def whole(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Samples]:
    """A run in one process that nothing stopped."""
    config = _config(data, tmp_path_factory.mktemp("whole"))
    return config, _train(config)


def _step_lines(config: TrainConfig) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run_uri(config)) if "loss" in line]


def _losses(config: TrainConfig) -> list[float]:
    return [line["loss"] for line in _step_lines(config)]


def _accuracies(config: TrainConfig) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run_uri(config)) if "knn_top1" in line]


def _weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    """The model in the run's last checkpoint."""
    path = Path(run_uri(config), "checkpoints", f"step-{_STEPS:09}.pt")
    return torch.load(path, weights_only=False)["model"]


def _forget_after(config: TrainConfig, step: int) -> None:
    """Leave of a run what its being killed after `step` would have left."""
    for checkpoint in Path(run_uri(config), "checkpoints").iterdir():
        if int(checkpoint.stem.removeprefix("step-")) > step:
            checkpoint.unlink()


def test_metrics_hold_every_step_once(whole: tuple[TrainConfig, Samples]) -> None:
    config, _ = whole
    lines = _step_lines(config)
    assert [line["step"] for line in lines] == list(range(1, _STEPS + 1))
    stages = {f"{stage}_seconds" for stage in ("data_wait", "forward", "gather", "backward", "optimizer")}
    assert all(
        set(line) == {"step", "epoch", "loss", "learning_rate", "images_per_second", "view_matching"} | stages
        and line["images_per_second"] > 0
        for line in lines
    )
    assert [line["epoch"] for line in lines] == [1] * _STEPS_PER_EPOCH + [2] * (_STEPS - _STEPS_PER_EPOCH)


def test_metrics_hold_the_accuracy_before_training_after_each_epoch_and_at_the_end(
    whole: tuple[TrainConfig, Samples],
) -> None:
    lines = _accuracies(whole[0])
    assert [(line["step"], line["epoch"]) for line in lines] == [(0, 0), (_STEPS_PER_EPOCH, 1), (_STEPS, 2)]
    assert [line for line in lines if "knn_top1_pixels" in line] == lines[:1]


def test_raw_pixels_of_digits_tell_them_apart(whole: tuple[TrainConfig, Samples]) -> None:
    before = _accuracies(whole[0])[0]
    assert before["knn_top1_pixels"] > 0.7  # Chance is 0.1.


def test_every_step_trains_on_a_batch_and_no_image_twice_an_epoch(whole: tuple[TrainConfig, Samples]) -> None:
    _, samples = whole
    assert [len(step) for step in samples] == [24] * _STEPS
    epoch = list(chain.from_iterable(samples[:_STEPS_PER_EPOCH]))
    assert len(set(epoch)) == len(epoch)
    assert set(epoch) <= set(range(_TRAIN_IMAGES))


def test_the_run_leaves_a_sheet_of_its_views(whole: tuple[TrainConfig, Samples]) -> None:
    with Image.open(Path(run_uri(whole[0]), "views.png")) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > sheet.height


def test_progress_hears_of_the_start_the_last_step_and_every_accuracy(
    data: DataConfig, tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    config = _config(data, tmp_path)
    _train(config, events.append)
    assert [line["phase"] for line in events if "phase" in line] == ["model", "evaluation", "first batch"]
    heard = [line for line in events if "phase" not in line]
    assert [line["knn_top1"] for line in heard if "knn_top1" in line] == [
        line["knn_top1"] for line in _accuracies(config)
    ]
    steps = [line for line in heard if "loss" in line]
    assert steps[0]["step"] == 1
    assert steps[-1]["step"] == _STEPS
    assert [steps[-1]["loss"]] == _losses(config)[-1:]
    assert all(line["steps"] == _STEPS for line in heard)


def test_the_same_config_gives_the_same_run(
    data: DataConfig, whole: tuple[TrainConfig, Samples], tmp_path: Path
) -> None:
    config = _config(data, tmp_path)
    assert _train(config) == whole[1]
    assert _losses(config) == _losses(whole[0])


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    data: DataConfig, whole: tuple[TrainConfig, Samples], tmp_path: Path
) -> None:
    def stop(values: dict[str, Any]) -> None:
        # The run is at an epoch's end, two steps after its last checkpoint.
        if values.get("step") == _STEPS_PER_EPOCH:
            raise KeyboardInterrupt

    config = _config(data, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        _train(config, stop)
    assert max(file.name for file in (tmp_path / "run/checkpoints").iterdir()) == "step-000000004.pt"
    assert _train(config) == whole[1][4:]
    assert [line["step"] for line in _step_lines(config)] == list(range(1, _STEPS + 1))
    assert _losses(config) == _losses(whole[0])
    assert _accuracies(config) == _accuracies(whole[0])
    torch.testing.assert_close(_weights(config), _weights(whole[0]), rtol=0, atol=0)


# Within the first epoch and its window of two steps, at the end of the epoch, and within the second.
@pytest.mark.parametrize("step", [3, 6, 7])
def test_a_run_can_be_resumed_from_any_step(
    step: int, data: DataConfig, whole: tuple[TrainConfig, Samples], tmp_path: Path
) -> None:
    config = _config(data, tmp_path, checkpoint={"every_steps": 1, "keep": 100})
    _train(config)
    _forget_after(config, step)
    assert _train(config) == whole[1][step:]
    assert _losses(config) == _losses(whole[0])
    torch.testing.assert_close(_weights(config), _weights(whole[0]), rtol=0, atol=0)


def test_a_finished_run_trains_no_further(
    data: DataConfig, whole: tuple[TrainConfig, Samples], tmp_path: Path
) -> None:
    config = _config(data, tmp_path)
    shutil.copytree(run_uri(whole[0]), run_uri(config))
    before = (tmp_path / "run/metrics.jsonl").read_text()
    assert _train(config) == []
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def _ranked(run_ranks: Callable, config: TrainConfig, world_size: int) -> Samples:
    """The samples of each step, over all ranks."""
    of_ranks = run_ranks(_train, world_size, config)
    return [sorted(chain.from_iterable(step)) for step in zip(*of_ranks, strict=True)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_ranks_gives_the_same_batches_losses_and_accuracies(
    world_size: int, data: DataConfig, whole: tuple[TrainConfig, Samples], run_ranks: Callable, tmp_path: Path
) -> None:
    config = _config(data, tmp_path)
    assert _ranked(run_ranks, config, world_size) == [sorted(step) for step in whole[1]]
    assert _losses(config) == pytest.approx(_losses(whole[0]), rel=1e-4)
    matching, expected = ([line["view_matching"] for line in _step_lines(run)] for run in (config, whole[0]))
    # A view may have two others so near that rounding decides.
    assert matching == pytest.approx(expected, abs=1.5 / 48)
    ours, theirs = _accuracies(config), _accuracies(whole[0])
    assert ours[0]["knn_top1_pixels"] == theirs[0]["knn_top1_pixels"]
    # A vote may be so close that rounding decides it.
    assert [line["knn_top1"] for line in ours] == pytest.approx(
        [line["knn_top1"] for line in theirs], abs=1.5 / 50
    )


def test_a_run_of_four_ranks_goes_on_with_two_and_then_one(
    data: DataConfig, whole: tuple[TrainConfig, Samples], run_ranks: Callable, tmp_path: Path
) -> None:
    config = _config(data, tmp_path)
    run_ranks(_train, 4, config)
    _forget_after(config, 4)
    assert _ranked(run_ranks, config, 2) == [sorted(step) for step in whole[1][4:]]
    _forget_after(config, 6)
    assert _train(config) == whole[1][6:]
    assert [line["step"] for line in _step_lines(config)] == list(range(1, _STEPS + 1))
    assert _losses(config) == pytest.approx(_losses(whole[0]), rel=1e-4)


def test_more_ranks_than_test_images_find_the_same_accuracy(
    data: DataConfig, run_ranks: Callable, tmp_path: Path
) -> None:
    evaluation = {"neighbours": 10, "test_images": 3}
    one, four = (_config(data, tmp_path / name, steps=1, evaluation=evaluation) for name in ("one", "four"))
    _train(one)
    run_ranks(_train, 4, four)
    assert _accuracies(four)[0] == pytest.approx(_accuracies(one)[0], rel=1e-6)


@pytest.fixture(scope="module")
def broken(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """The same digits: one cut off, one garbled so that only decoding tells, and one empty."""
    folder = tmp_path_factory.mktemp("broken")
    rows = list(small_digits(0, _TRAIN_IMAGES))
    harmed = {17: lambda png: png[:-30], 60: lambda png: png[:60] + b"garbled" + png[67:], 99: lambda _: b""}
    for row, harm in harmed.items():
        content, label, key = rows[row]
        rows[row] = harm(content), label, key
    write_shards(iter(rows), str(folder / "train"), rows_per_shard=60, rows_per_group=25)
    return replace(data, train=str(folder / "train"), max_bad_share=0.03)


def _left_out(config: TrainConfig) -> dict[str, str]:
    """The keys in the run's quarantine.jsonl and why."""
    lines = Path(run_uri(config), "quarantine.jsonl").read_text().splitlines()
    images = [json.loads(line) for line in lines]
    assert {Path(image["path"]).suffix for image in images} == {".parquet"}
    return {image["key"]: image["reason"] for image in images}


def test_bad_images_cost_nothing_but_themselves_on_any_number_of_ranks(
    broken: DataConfig, whole: tuple[TrainConfig, Samples], run_ranks: Callable, tmp_path: Path
) -> None:
    alone, together = (_config(broken, tmp_path / name) for name in ("alone", "together"))
    assert _train(alone) == whole[1]
    assert _ranked(run_ranks, together, 2) == [sorted(step) for step in whole[1]]
    assert _losses(together) == pytest.approx(_losses(alone), rel=1e-4)
    reasons = _left_out(alone)
    assert (reasons["digit-17"], reasons["digit-99"]) == ("truncated PNG", "no bytes")
    assert reasons.keys() == {"digit-17", "digit-60", "digit-99"}
    assert _left_out(together) == reasons
    counts = [line["quarantined"] for line in read_metrics(run_uri(alone)) if "quarantined" in line]
    assert counts[-1] == 3


def _with_a_deadly_image(index: Index, data: DataConfig, windows: Iterable[Window]) -> Iterator[pa.Table]:
    return (with_deadly(table, 60) for table in read_windows(index, data, windows))


def _train_on_a_deadly_image(config: TrainConfig, careful_until: int) -> None:
    gather = ProcessGroupGather() if dist.get_world_size() > 1 else LocalGather()
    worker = Worker(gather=gather, device=torch.device("cpu"), threads=1, tables=_with_a_deadly_image)
    index = build_index(config.data.train, config.data)
    train(config, Sets.of(config, index, None), worker, _ignore, careful_until=careful_until)


def test_an_image_that_ends_the_worker_is_found_and_left_out_ever_after(
    data: DataConfig, run_ranks: Callable, tmp_path: Path
) -> None:
    evaluation = {"diagnostic_images": 0}
    plain = replace(data, test=None)
    config, other = (_config(plain, tmp_path / name, evaluation=evaluation) for name in ("one", "two"))
    with pytest.raises(RuntimeError, match="its process died"):
        run_ranks(_train_on_a_deadly_image, 1, config, 0)
    run_ranks(_train_on_a_deadly_image, 1, config, _STEPS)
    assert _left_out(config) == {"digit-60": "decoding it ends the process (SIGSEGV)"}
    assert len(_losses(config)) == _STEPS
    # Known from now on, it ends no worker again, and which one stands in for it is the same on two ranks.
    _forget_after(config, 2)
    run_ranks(_train_on_a_deadly_image, 1, config, 0)
    run_ranks(_train_on_a_deadly_image, 2, other, _STEPS)
    assert _losses(other) == pytest.approx(_losses(config), rel=1e-4)


def test_too_many_bad_images_end_the_run_and_are_all_written_down(broken: DataConfig, tmp_path: Path) -> None:
    config = _config(replace(broken, max_bad_share=0.01), tmp_path)
    with pytest.raises(ValueError, match=r"of 149 images are bad, more than data.max_bad_share=0.01"):
        _train(config)
    assert len(_left_out(config)) >= 2


def test_epochs_decide_the_steps_unless_they_are_given(data: DataConfig, tmp_path: Path) -> None:
    config = _config(data, tmp_path, steps=None, epochs=3)
    plan = make_plan(config, build_index(data.train, data))
    assert total_steps(config, plan) == 3 * _STEPS_PER_EPOCH
    assert total_steps(replace(config, steps=7), plan) == 7


def test_a_supervised_runs_classifier_is_judged_on_the_test_images(
    data: DataConfig, run_ranks: Callable, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {
        "objective": "supervised", "supervised": {"classes": 10}, "temperature": 0.1, "projector": {},
        "optimizer": {"name": "adamw", "learning_rate": 0.01, "scaling": "none"}, "steps": 60,
    }  # fmt: skip
    alone, together = (_config(data, tmp_path / name, **fields) for name in ("one", "two"))
    _train(alone)
    run_ranks(_train, 2, together)
    before, *_, after = [line["top1"] for line in _accuracies(alone)]
    assert before < 0.3
    assert after > before + 0.2
    assert _accuracies(together)[0]["top1"] == pytest.approx(before, abs=1.5 / 50)


def test_micro_batches_train_the_same_on_any_number_of_ranks(
    data: DataConfig, whole: tuple[TrainConfig, Samples], run_ranks: Callable, tmp_path: Path
) -> None:
    alone, together = (_config(data, tmp_path / name, micro_batch_size=8) for name in ("one", "two"))
    _train(alone)
    run_ranks(_train, 2, together)
    # Statistics of so few images let rounding grow faster.
    assert _losses(together)[:3] == pytest.approx(_losses(alone)[:3], rel=4e-5)
    assert _losses(together) == pytest.approx(_losses(alone), rel=5e-3)
    # Batch norm's statistics are those of 8 images, so the losses are near the whole batch's, but not they.
    assert _losses(alone) == pytest.approx(_losses(whole[0]), rel=0.2)
    assert _losses(alone) != pytest.approx(_losses(whole[0]), rel=1e-4)


@pytest.mark.slow
def test_a_compiled_encoder_trains_as_the_others_do(
    data: DataConfig, whole: tuple[TrainConfig, Samples], tmp_path: Path
) -> None:
    config = _config(data, tmp_path, compile=True, steps=2)
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    _train(config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > compilations
    assert _losses(config)[0] == pytest.approx(_losses(whole[0])[0], rel=1e-4)
    saved = torch.load(tmp_path / "run/checkpoints/step-000000002.pt", weights_only=True)
    assert saved["model"].keys() == _weights(whole[0]).keys()


def test_a_run_without_test_images_evaluates_nothing(data: DataConfig, tmp_path: Path) -> None:
    _train(_config(replace(data, test=None), tmp_path, steps=2))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert not [line for line in lines if "knn_top1" in line]
    assert [set(line) - {"step", "epoch", "crc32"} for line in lines if "loss" not in line] == [
        {"workers"},
        {"alignment", "uniformity", "effective_rank"},
        {"alignment", "uniformity", "effective_rank"},
    ]


def test_held_out_training_images_are_watched_and_test_images_looked_at_once(
    data: DataConfig, run_ranks: Callable, tmp_path: Path
) -> None:
    evaluation = {"every_epochs": 1, "neighbours": 10, "held_out": 0.3}
    alone, together = (
        _config(data, tmp_path / name, evaluation=evaluation) for name in ("alone", "together")
    )
    samples = _train(alone)
    kept, held_out = build_index(data.train, data).split(0.3, alone.seed)
    numbers = set(held_out.samples.tolist())
    assert len(numbers) + kept.rows.sum() == _TRAIN_IMAGES
    assert not numbers & set(chain.from_iterable(samples))
    lines = _accuracies(alone)
    assert [line["step"] for line in lines if "knn_top1_test" in line] == [_STEPS]
    assert _ranked(run_ranks, together, 2) == [sorted(step) for step in samples]
    for ours, theirs in zip(_accuracies(together), lines, strict=True):
        assert ours["knn_top1"] == pytest.approx(theirs["knn_top1"], abs=1.5 / len(numbers))
        assert ours["effective_rank"] == pytest.approx(theirs["effective_rank"], rel=1e-3)


def test_a_run_starts_from_another_ones_encoder(
    data: DataConfig, whole: tuple[TrainConfig, Samples], tmp_path: Path
) -> None:
    checkpoint = str(Path(run_uri(whole[0]), "checkpoints", f"step-{_STEPS:09}.pt"))
    fields: dict[str, Any] = {"objective": "supervised", "temperature": 0.1, "projector": {}, "steps": 1}
    config = _config(data, tmp_path, init=checkpoint, supervised={"classes": 10}, **fields)
    _train(config)
    first, *_, last = [line["alignment"] for line in _accuracies(whole[0])]
    assert _accuracies(config)[0]["alignment"] == pytest.approx(last, rel=1e-5)
    assert first != pytest.approx(last, rel=1e-3)


def test_a_run_that_has_a_checkpoint_no_longer_needs_the_one_that_it_started_from(
    data: DataConfig, whole: tuple[TrainConfig, Samples], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "other.pt"
    shutil.copy(Path(run_uri(whole[0]), "checkpoints", f"step-{_STEPS:09}.pt"), checkpoint)
    config = _config(data, tmp_path, init=str(checkpoint), checkpoint={"every_steps": 1, "keep": 9}, steps=3)
    _train(config)
    losses = _losses(config)
    checkpoint.unlink()
    (tmp_path / "run/checkpoints/step-000000003.pt").unlink()
    _train(config)
    assert _losses(config) == losses


def test_another_encoders_weights_are_refused(
    data: DataConfig, whole: tuple[TrainConfig, Samples], tmp_path: Path
) -> None:
    checkpoint = str(Path(run_uri(whole[0]), "checkpoints", f"step-{_STEPS:09}.pt"))
    with pytest.raises(ValueError, match="resnet8, does not fit this run's: set the same --encoder fields"):
        _train(_config(data, tmp_path, init=checkpoint, encoder={"name": "resnet20"}))
    with pytest.raises(ValueError, match=r"there is no file .*nowhere.pt; give --init a run"):
        _train(_config(data, tmp_path, init=str(tmp_path / "nowhere.pt")))


def test_the_average_of_the_weights_is_what_is_judged_and_it_survives_a_resume(
    data: DataConfig, whole: tuple[TrainConfig, Samples], tmp_path: Path
) -> None:
    optimizer = {"name": "sgd", "learning_rate": 0.001, "scaling": "none", "weight_decay": 1e-4}
    config = _config(data, tmp_path, optimizer={**optimizer, "average_decay": 0.75})
    _train(config)
    assert _losses(config) == _losses(whole[0])
    folder = tmp_path / "run/checkpoints"
    saved = [torch.load(folder / f"step-{step:09}.pt", weights_only=True) for step in (6, 8)]
    key = _first_weight(saved[0])
    for checkpoint in saved:
        assert not torch.equal(checkpoint["average"][f"module.{key}"], checkpoint["model"][key])
    judged = load_encoder(config, _STEPS).state_dict()[key.removeprefix("encoder.")]
    assert torch.equal(judged, saved[1]["average"][f"module.{key}"])

    (folder / f"step-{_STEPS:09}.pt").unlink()
    _train(config)
    again = torch.load(folder / f"step-{_STEPS:09}.pt", weights_only=True)
    assert torch.equal(again["average"][f"module.{key}"], saved[1]["average"][f"module.{key}"])


def test_the_average_is_each_steps_share_of_the_weights(data: DataConfig, tmp_path: Path) -> None:
    optimizer = {"name": "sgd", "learning_rate": 0.01, "scaling": "none", "average_decay": 0.75}
    config = _config(data, tmp_path, optimizer=optimizer, checkpoint={"every_steps": 1, "keep": 9}, steps=4)
    _train(config)
    saved = [
        torch.load(tmp_path / f"run/checkpoints/step-{step:09}.pt", weights_only=True) for step in range(1, 5)
    ]
    key = _first_weight(saved[0])
    expected = saved[0]["model"][key].double()
    for checkpoint in saved[1:]:
        expected = 0.75 * expected + 0.25 * checkpoint["model"][key].double()
    torch.testing.assert_close(saved[-1]["average"][f"module.{key}"].double(), expected, rtol=1e-5, atol=1e-7)


def _first_weight(checkpoint: dict[str, Any]) -> str:
    return next(key for key in checkpoint["model"] if key.startswith("encoder.") and key.endswith(".weight"))


def _poison(config: TrainConfig, samples: set[int]) -> Any:
    """From now on steps that see one of these samples have views that are not a number."""

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        if isinstance(module, Objective) and samples & set(inputs[0].samples.tolist()):
            images = tuple(view * torch.nan for view in inputs[0].images)
            return (replace(inputs[0], images=images),)
        return None

    return register_module_forward_pre_hook(note)


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    data: DataConfig, whole: tuple[TrainConfig, Samples], tmp_path: Path
) -> None:
    config = _config(data, tmp_path)
    hook = _poison(config, {whole[1][3][0]})
    try:
        _train(config)
    finally:
        hook.remove()
    lines = read_metrics(run_uri(config))
    skipped = [line["step"] for line in lines if "skipped" in line]
    assert skipped[0] == 4
    assert len(skipped) <= 2  # The image comes again in the second epoch.
    assert [line["skipped"] for line in lines if "skipped" in line] == list(range(1, len(skipped) + 1))
    assert sorted([line["step"] for line in _step_lines(config)] + skipped) == list(range(1, _STEPS + 1))
    assert _losses(config)[:3] == _losses(whole[0])[:3]
    assert all(torch.isfinite(value).all() for value in _weights(config).values())


def test_several_in_a_row_go_back_to_the_last_checkpoint_and_skip_that_data(
    data: DataConfig, whole: tuple[TrainConfig, Samples], tmp_path: Path
) -> None:
    # Steps 3 to 5; the last checkpoint is that of step 4, which has the weights of step 2.
    seen = set(whole[1][2] + whole[1][3] + whole[1][4])
    later = {sample for step in whole[1][5:] for sample in step}
    config = _config(data, tmp_path, steps=6)
    hook = _poison(config, seen - later if seen - later else seen)
    try:
        _train(config)
    finally:
        hook.remove()
    lines = read_metrics(run_uri(config))
    assert [line["step"] for line in lines if "skipped" in line] == [3, 4, 5]
    assert [(line["step"], line["rolled_back_to"]) for line in lines if "rolled_back_to" in line] == [(5, 4)]
    assert [line["step"] for line in _step_lines(config)] == [1, 2, 6]


def test_a_run_that_never_is_finite_ends_and_says_where(
    data: DataConfig, whole: tuple[TrainConfig, Samples], tmp_path: Path
) -> None:
    hook = _poison(whole[0], set(range(_TRAIN_IMAGES)))
    try:
        with pytest.raises(ValueError, match="steps 1 to 3, before the first checkpoint; try a lower"):
            _train(_config(data, tmp_path / "never", checkpoint={"every_steps": 100, "keep": 2}))
        with pytest.raises(ValueError, match="in steps 4 to 6, as in steps 1 to 3 before it went back"):
            _train(_config(data, tmp_path / "twice"))
    finally:
        hook.remove()


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_bit_for_bit(
    data: DataConfig, whole: tuple[TrainConfig, Samples], tmp_path: Path
) -> None:
    config = _config(data, tmp_path, checkpoint={"every_steps": 100, "keep": 2})
    asked = iter([False, False, False, True])  # Before the first step, and after each.
    with pytest.raises(StoppedError, match="stopped after step 3"):
        _train(config, stopping=lambda: next(asked))
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000000003.pt"]
    assert [line["step"] for line in _step_lines(config)] == [1, 2, 3]
    _train(config)
    assert _losses(config) == _losses(whole[0])
    for key, value in _weights(whole[0]).items():
        assert torch.equal(_weights(config)[key], value), key


def test_checkpoints_are_written_by_the_clock_too(data: DataConfig, tmp_path: Path) -> None:
    _train(_config(data, tmp_path, checkpoint={"every_steps": 100, "every_minutes": 1e-9, "keep": 100}))
    names = [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())]
    assert names == [f"step-{step:09}.pt" for step in range(1, _STEPS + 1)]


def test_the_best_checkpoint_by_held_out_images_stays(data: DataConfig, tmp_path: Path) -> None:
    config = _config(
        data, tmp_path, steps=24, evaluation={"every_epochs": 1, "neighbours": 10, "held_out": 0.3},
        checkpoint={"every_steps": 100, "keep": 1},
    )  # fmt: skip
    _train(config)
    accuracies = {line["step"]: line["knn_top1"] for line in _accuracies(config) if line["step"]}
    step, score = Checkpoints(run_uri(config), keep=1).best()
    assert score == max(accuracies.values())
    assert step == min(at for at, value in accuracies.items() if value == score)
    kept = [int(path.stem[5:]) for path in (tmp_path / "run/checkpoints").glob("*.pt")]
    assert sorted(kept) == sorted({step, 24})
