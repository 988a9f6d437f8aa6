"""What is saved is loaded bit for bit, and nothing torn or unsafe is."""

import io
import math
import random
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from flips import flips, noticed
from torch import nn
from torch.optim import Optimizer

from pipelines.config import DataConfig
from training.checkpoint import Checkpoints, DamagedError, read_checkpoint
from training.config import OptimizerConfig, TrainConfig, config_hash
from training.optimizers import build_optimizer, set_learning_rate

_TENSORS = ("model", "optimizer", "random")

_CONFIG = TrainConfig(data=DataConfig(train="somewhere"))


def _trained(optimizer_name: Any, steps: int) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 1))
    optimizer = build_optimizer(model, OptimizerConfig(name=optimizer_name))
    set_learning_rate(optimizer, 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def _save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(step, *_trained("sgd", 1), _CONFIG)


def _files(run: Path) -> list[str]:
    return sorted(file.name for file in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_model_and_optimizer_are_loaded_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, optimizer = _trained(name, 3)
    Checkpoints(str(tmp_path), keep=1).save(3, model, optimizer, _CONFIG)
    saved = Checkpoints(str(tmp_path), keep=1).latest()
    assert saved is not None
    assert saved["step"] == 3
    torch.testing.assert_close(saved["model"], dict(model.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(saved["optimizer"], optimizer.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(name: str, tmp_path: Path) -> None:
    def step(model: nn.Module, optimizer: Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(8, 6).tril()).square().mean().backward()
        optimizer.step()

    going_on, resumed = _trained(name, 3), _trained(name, 0)
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    checkpoints.save(3, *going_on, _CONFIG)
    saved = checkpoints.latest()
    assert saved is not None
    resumed[0].load_state_dict(saved["model"])
    resumed[1].load_state_dict(saved["optimizer"])
    for pair in (going_on, resumed):
        step(*pair)
    torch.testing.assert_close(resumed[0].state_dict(), going_on[0].state_dict(), rtol=0, atol=0)


def test_the_config_is_saved_with_the_weights(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    _save(checkpoints, 1)
    saved = checkpoints.latest()
    assert saved is not None
    assert TrainConfig(**saved["config"]) == _CONFIG
    assert saved["config"] == asdict(_CONFIG)
    assert saved["config_hash"] == config_hash(_CONFIG)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=2)
    for step in (1, 9, 10, 100):
        _save(checkpoints, step)
    assert _files(tmp_path) == ["step-000000010.pt", "step-000000100.pt"]
    assert checkpoints.latest_step() == 100


def test_an_empty_folder_holds_no_checkpoint(tmp_path: Path) -> None:
    for run in (tmp_path, tmp_path / "nowhere"):
        checkpoints = Checkpoints(str(run), keep=2)
        assert checkpoints.latest() is None
        assert checkpoints.latest_step() is None


def test_a_torn_write_is_never_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=2)
    _save(checkpoints, 5)
    whole = (tmp_path / "checkpoints/step-000000005.pt").read_bytes()
    (tmp_path / "checkpoints/.step-000000009.pt.123.partial").write_bytes(whole[: len(whole) // 2])
    saved = checkpoints.latest()
    assert saved is not None
    assert saved["step"] == checkpoints.latest_step() == 5


def test_a_saved_checkpoint_leaves_nothing_else_behind(tmp_path: Path) -> None:
    _save(Checkpoints(str(tmp_path), keep=2), 5)
    assert _files(tmp_path) == ["step-000000005.pt"]


class _Creates:
    """Unpickled without care, it creates the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    torch.save({"step": 5, "model": _Creates(tmp_path / "ran")}, tmp_path / "checkpoints/step-000000005.pt")
    with pytest.raises(ValueError, match=r"step-000000005.pt is damaged: .* could run code"):
        Checkpoints(str(tmp_path), keep=2).latest()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("foreign", [{}, {"model": None, "config": {}}, {"model": {}}, {"config": {}}])
def test_a_file_of_another_program_is_no_checkpoint(foreign: dict, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    torch.save({"step": 5} | foreign, tmp_path / "checkpoints/step-000000005.pt")
    with pytest.raises(DamagedError, match="it is not a checkpoint of a run"):
        Checkpoints(str(tmp_path), keep=2).latest()


def _reader(path: Path) -> Callable[[bytes], dict[str, Any]]:
    def read(content: bytes) -> dict[str, Any]:
        path.write_bytes(content)
        return read_checkpoint(str(path)) or {}

    return read


def _same(found: dict[str, Any], whole: dict[str, Any]) -> bool:
    rest = [{key: value for key, value in saved.items() if key not in _TENSORS} for saved in (found, whole)]
    tensors = [{key: saved.get(key) for key in _TENSORS} for saved in (found, whole)]
    torch.testing.assert_close(*tensors, rtol=0, atol=0)
    return rest[0] == rest[1]


def test_every_bit_is_checked(tmp_path: Path) -> None:
    _save(Checkpoints(str(tmp_path), keep=1), 5)
    path = tmp_path / "checkpoints/step-000000005.pt"
    assert noticed(_reader(path), path.read_bytes(), same=_same, every=151) > 0.99


def test_every_bit_is_checked_of_a_file_without_a_checksum_of_diptychs(tmp_path: Path) -> None:
    out = io.BytesIO()
    torch.save({"step": 5, "model": {"a": torch.arange(6.0)}, "config": {"b": "c"}}, out)
    # What nothing reads may change: times, attributes, what fills a tensor up to the next boundary.
    assert noticed(_reader(tmp_path / "a.pt"), out.getvalue(), same=_same, every=5) > 0.5


def test_a_member_that_is_marked_as_a_folder_is_not_taken_for_an_empty_tensor(tmp_path: Path) -> None:
    out = io.BytesIO()
    torch.save({"step": 5, "model": {"a": torch.arange(6.0)}, "config": {}}, out)
    content = bytearray(out.getvalue())
    # The bit of its entry in the zip's directory, which has its name 46 bytes from its start.
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"archive/data/0"))
    content[entry + 38] ^= 0x10
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
    with pytest.raises(DamagedError, match="wrong checksum of archive/data/0"):
        _reader(tmp_path / "a.pt")(bytes(content))


def test_flipped_bits_of_a_large_one_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    generator = random.Random(0)
    Checkpoints(str(tmp_path), 1).write(5, {"step": 5, "model": {"a": torch.randn(1_000_000)}, "config": {}})
    content = (tmp_path / "checkpoints/step-000000005.pt").read_bytes()
    for harmed in flips(content, generator.sample(range(8 * len(content)), 40)):
        with pytest.raises(DamagedError, match="its checksum does not match"):
            _reader(path)(harmed)


def test_torch_loads_what_has_a_checksum(tmp_path: Path) -> None:
    _save(Checkpoints(str(tmp_path), keep=1), 5)
    path = tmp_path / "checkpoints/step-000000005.pt"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    for mmap in (False, True):
        assert torch.load(path, weights_only=True, mmap=mmap)["step"] == 5


def test_a_file_that_is_broken_off_anywhere_is_found(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    _save(checkpoints, 5)
    path = tmp_path / "checkpoints/step-000000005.pt"
    whole = path.read_bytes()
    for length in {0, 1, 22, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 40)}:
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedError, match=r"step-000000005.pt is damaged: "):
            checkpoints.load(5)


def test_a_write_never_deletes_itself_for_a_damaged_file_that_comes_later(tmp_path: Path) -> None:
    _save(Checkpoints(str(tmp_path), keep=1), 5)
    (tmp_path / "checkpoints/step-000000009.pt").write_bytes(b"garbage")
    _save(Checkpoints(str(tmp_path), keep=1), 7)
    assert _files(tmp_path) == ["step-000000007.pt"]


def test_a_damaged_note_of_the_best_is_no_note(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    checkpoints.write(3, {"step": 3}, score=0.5)
    assert checkpoints.best() == (3, 0.5)
    for content in (b"", b'{"st', b"[]", b"\xff"):
        (tmp_path / "checkpoints/best.json").write_bytes(content)
        assert checkpoints.best() == (None, -math.inf)


def test_checkpoints_that_another_process_has_written_since_the_start_are_left(tmp_path: Path) -> None:
    run = str(tmp_path)
    for step in (1, 2, 9):
        _save(Checkpoints(run, keep=9), step)
    Path(Checkpoints(run, 1).uri(9)).write_bytes(b"torn")
    ours, names = (
        Checkpoints(run, keep=1),
        lambda: sorted(p.stem for p in (tmp_path / "checkpoints").iterdir()),
    )
    found = ours.latest()
    assert found
    assert found["step"] == 2
    for step in (3, 8):
        _save(Checkpoints(run, keep=9), step)  # By one that has taken the run over.
    for step in (4, 5):
        _save(ours, step)
    assert names() == [f"step-{step:09}" for step in (3, 5, 8)]
