"""A damaged checkpoint: a run resumes from the one before it and says so; where none is whole, one line."""

import io
import shutil
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from small_digits import write_small_digits

from cluster.data import run_embed
from cluster.evaluate import run_evaluation, run_export
from cluster.train import run_training, with_absolute_paths
from pipelines.config import RECIPES, DataConfig
from pipelines.index import build_index
from pipelines.reader import read_windows
from training.config import EvaluationConfig, TrainConfig
from training.evaluation.evaluator import Sets
from training.export import read_trained
from training.gather import LocalGather, ProcessGroupGather
from training.metrics import read_metrics
from training.process import Worker
from training.run_folder import claim_run, keep_index
from training.trainer import run_uri, train


def _wrong_checksum(whole: bytes) -> bytes:
    """One bit of a tensor changed: torch loads it without a word."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        value = archive.read(largest)
    harmed = bytearray(whole)
    harmed[whole.index(value) + len(value) // 2] ^= 1
    torch.load(io.BytesIO(harmed), weights_only=True)
    return bytes(harmed)


_HARM: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "garbage": lambda whole: b"garbage" * 1000,
    "checksum": _wrong_checksum,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of six steps that is finished, with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("damaged")
    write_small_digits(folder, 49)
    data = DataConfig(
        train=str(folder / "train"), test=str(folder / "test"), window_rows=12,
        view=replace(RECIPES["simclr-cifar"][0], size=16),
    )  # fmt: skip
    fields: dict[str, Any] = {
        "name": "whole", "batch_size": 24, "lanes": 2, "steps": 6, "encoder": {"name": "resnet8"},
        "projector": {"hidden_dim": 32, "dim": 16}, "optimizer": {"name": "sgd", "learning_rate": 0.001},
        "evaluation": {"diagnostic_images": 0}, "checkpoint": {"every_steps": 2, "keep": 3},
    }  # fmt: skip
    config = TrainConfig(data=data, output=str(folder), **fields)
    claim_run(run_uri(config), config)
    _train(config)
    return config


def _train(config: TrainConfig) -> list[dict[str, Any]]:
    """Train in this process, or as the rank that it is; what progress hears."""
    heard: list[dict[str, Any]] = []
    gather = ProcessGroupGather() if dist.is_initialized() else LocalGather()
    worker = Worker(gather=gather, device=torch.device("cpu"), threads=1, tables=read_windows)
    index = build_index(config.data.train, config.data)
    train(config, Sets(index, None, None), worker, heard.append)
    return heard


def _checkpoint(config: TrainConfig, step: int) -> Path:
    return Path(run_uri(config), "checkpoints", f"step-{step:09}.pt")


def _copy(base: TrainConfig, output: Path, *steps: int, harm: str = "truncated") -> TrainConfig:
    """A copy of the run, with the checkpoints of these steps damaged."""
    config = replace(base, output=str(output))
    shutil.copytree(run_uri(base), run_uri(config))
    for step in steps:
        path = _checkpoint(config, step)
        path.write_bytes(_HARM[harm](path.read_bytes()))
    return config


def _steps(lines: Iterable[dict[str, Any]]) -> list[int]:
    return [line["step"] for line in lines if "loss" in line]


def _warnings(lines: Iterable[dict[str, Any]]) -> list[str]:
    return [line["warning"] for line in lines if "warning" in line]


@pytest.mark.parametrize("harm", _HARM)
def test_a_run_resumes_from_the_newest_whole_one_and_says_so(
    harm: str, base: TrainConfig, tmp_path: Path
) -> None:
    config = _copy(base, tmp_path, 6, harm=harm)
    heard = _train(config)
    assert _steps(heard)[0] == 5
    (warning,) = _warnings(heard)
    assert warning.startswith(f"{_checkpoint(config, 6)} is damaged: ")
    assert warning.endswith("; took step 4 instead")
    assert _warnings(read_metrics(run_uri(config))) == [warning]
    ours, theirs = (torch.load(_checkpoint(c, 6), weights_only=True)["model"] for c in (config, base))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert _steps(read_metrics(run_uri(config))) == [1, 2, 3, 4, 5, 6]


def test_two_ranks_resume_from_the_same_one(base: TrainConfig, run_ranks: Callable, tmp_path: Path) -> None:
    config = _copy(base, tmp_path, 4, 6, harm="checksum")
    heard, silent = run_ranks(_train, 2, config)
    assert _steps(heard)[0] == 3
    assert _warnings(heard)[0].endswith("; took step 2 instead")
    assert not _warnings(silent)
    ours, theirs = (
        [line["loss"] for line in read_metrics(run_uri(run)) if "loss" in line] for run in (config, base)
    )
    assert ours == pytest.approx(theirs, rel=1e-4)


def _resumed(config: TrainConfig, folder: Path) -> object:
    return run_training(config)


def _evaluated(config: TrainConfig, folder: Path) -> object:
    return run_evaluation(run_uri(config))


def _exported(config: TrainConfig, folder: Path) -> object:
    return run_export(run_uri(config), str(folder / "encoder"), "safetensors")


def _embedded(config: TrainConfig, folder: Path) -> object:
    return run_embed(run_uri(config), config.data.train, str(folder / "features"))


def _begun(config: TrainConfig, folder: Path) -> object:
    return run_training(replace(config, name="other", init=run_uri(config)))


def _begun_at(config: TrainConfig, folder: Path) -> object:
    return run_training(replace(config, name="other", init=str(_checkpoint(config, 6))))


@pytest.mark.parametrize("use", [_resumed, _evaluated, _exported, _embedded, _begun, _begun_at])
def test_where_none_is_whole_the_file_is_named_before_anything_starts(
    use: Callable[[TrainConfig, Path], object], base: TrainConfig, tmp_path: Path
) -> None:
    config = _copy(base, tmp_path, 2, 4, 6)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=rf"^{_checkpoint(config, 6)} is damaged: .*; .*restore") as refused:
        use(config, tmp_path)
    assert "\n" not in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("metrics.jsonl", r"metrics.jsonl is damaged in line \d+; restore it, or delete that line$"),
        ("config.toml", r"config.toml is damaged: .*; restore it(, or, if you have edited it, .* crc32)?$"),
        (
            "index/train.parquet",
            r"index/train.parquet is damaged: .*; restore it or, .* delete it to list them",
        ),
    ],
)
@pytest.mark.parametrize("harm", ["truncated", "garbage"])
def test_another_file_of_the_run_that_is_damaged_is_named_before_anything_starts(
    name: str, said: str, harm: str, base: TrainConfig, tmp_path: Path
) -> None:
    config = _copy(base, tmp_path, 6)
    keep_index(run_uri(config), "train", build_index(config.data.train, config.data))
    path = Path(run_uri(config), name)
    # Neither TOML nor JSON ends in the middle of a line's key. The newline tells that from a line of metrics
    # that a killed process has left unfinished.
    path.write_bytes(_HARM[harm](path.read_bytes()).rstrip(b'"]}\n\r0123456789. ') + b'"\n')
    with pytest.raises(ValueError, match=rf"^{tmp_path}.*{said}"):
        run_training(config)
    assert not ray.is_initialized()


def test_a_step_that_is_asked_for_and_damaged_is_named(base: TrainConfig, tmp_path: Path) -> None:
    config = _copy(base, tmp_path, 4)
    with pytest.raises(ValueError, match=rf"^{_checkpoint(config, 4)} is damaged: "):
        run_export(run_uri(config), str(tmp_path / "encoder"), "safetensors", 4)
    assert read_trained(run_uri(config)).step == 6


def test_what_takes_the_newest_takes_the_one_before_and_says_so(
    base: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, said = _copy(base, tmp_path, 6), "is damaged: File is not a zip file; took step 4 instead\n"
    run_export(run_uri(config), str(tmp_path / "encoder"), "safetensors")
    shown = capsys.readouterr()
    assert "resnet8 after 4 steps" in shown.out
    assert shown.err == f"diptych: warning: {_checkpoint(config, 6)} {said}"
    other = with_absolute_paths(replace(config, name="other", init=run_uri(config)))
    assert other.init == str(_checkpoint(config, 4))
    assert capsys.readouterr().err == f"diptych: warning: {_checkpoint(config, 6)} {said}"


def test_the_best_is_found_anew_where_its_checkpoint_was_damaged(base: TrainConfig, tmp_path: Path) -> None:
    config = replace(base, output=str(tmp_path), evaluation=EvaluationConfig(held_out=0.3, neighbours=5))
    sets = Sets.of(config, build_index(config.data.train, config.data), None)
    worker = Worker(gather=LocalGather(), device=torch.device("cpu"), threads=1, tables=read_windows)
    train(config, sets, worker, lambda _: None)
    note = tmp_path / "whole/checkpoints/best.json"
    before = note.read_bytes()
    _checkpoint(config, 6).write_bytes(b"")
    train(config, sets, worker, lambda _: None)
    assert note.read_bytes() == before
    assert torch.load(_checkpoint(config, 6), weights_only=True)["step"] == 6
