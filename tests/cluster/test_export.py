"""diptych export: a run in any storage to a file in any storage, or one clear line and nothing written."""

import sys
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load
from torch import nn

from cluster.cli.main import main
from pipelines import storage
from pipelines.config import DataConfig
from training.checkpoint import Checkpoints
from training.config import TrainConfig
from training.config.encoder import EncoderConfig
from training.models.encoders import build_encoder
from training.run_folder import claim_run


def _save(run: str, name: str) -> dict[str, torch.Tensor]:
    """A run with one checkpoint; its trunk's weights."""
    config = TrainConfig(data=DataConfig(train="somewhere"), encoder=EncoderConfig(name=name))
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": build_encoder(config.encoder)})
    claim_run(run, config)
    Checkpoints(run, 2).save(30, model, torch.optim.SGD(model.parameters()), config)
    return model["encoder"].get_submodule("trunk").state_dict()


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command leaves on standard error."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_a_run_in_object_storage_is_exported_into_it(bucket: str) -> None:
    weights = _save(f"{bucket}/exported/run", "plain8")
    main(["export", f"{bucket}/exported/run", f"{bucket}/exported/e.safetensors", "--format", "safetensors"])
    content = storage.read(f"{bucket}/exported/e.safetensors")
    assert content is not None
    found = load(content)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_the_command_says_how_torchvision_loads_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = _save(str(tmp_path / "run"), "resnet18")
    dest = tmp_path / "resnet18.pt"
    main(["export", str(tmp_path / "run"), str(dest), "--format", "torchvision", "--checkpoint", "30"])
    said = capsys.readouterr().out
    assert "resnet18 after 30 steps" in said
    assert "input: 224 x 224 pixels scaled to 0 to 1, minus the mean (0.485, 0.456, 0.406)" in said
    call = (
        said.splitlines()[-1]
        .removeprefix("load it with ")
        .partition("; ")[0]
        .replace("PATH", repr(str(dest)))
    )
    eval(call, {"torch": torch, "torchvision": torchvision})
    model = torchvision.models.resnet18(weights=None)
    model.load_state_dict(torch.load(dest, weights_only=True), strict=True)
    assert torch.equal(model.layer4[1].conv2.weight, weights["layer4.1.conv2.weight"])


def test_what_cannot_be_exported_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, dest = str(tmp_path / "run"), tmp_path / "out" / "file"
    onnx = ["export", run, str(dest), "--format", "onnx"]
    assert f"{run} is not a run" in _refused(onnx, capsys)
    _save(run, "resnet8")
    torchvisions = ["export", run, str(dest), "--format", "torchvision"]
    assert "torchvision has no resnet8; try --format safetensors" in _refused(torchvisions, capsys)
    assert "no checkpoint of step 31; it has 30" in _refused([*onnx, "--checkpoint", "31"], capsys)
    assert "--format" in _refused(["export", run, str(dest)], capsys)
    assert "torchvision" in _refused(["export", run, str(dest), "--format", "tensorflow"], capsys)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "needs onnxscript; install it with: pip install" in _refused(onnx, capsys)
    assert not dest.parent.exists()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _save(str(tmp_path / "run"), "resnet8")
    (tmp_path / "file").write_text("in the way")
    arguments = ["export", str(tmp_path / "run"), f"{tmp_path}/file/encoder", "--format", "safetensors"]
    assert f"cannot write {tmp_path}/file/encoder: " in _refused(arguments, capsys)
