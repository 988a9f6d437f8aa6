"""Exported encoders in the programs that are to read them: torchvision, safetensors, onnxruntime."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import torch
import torchvision
from counting import randomise_statistics
from torch import nn

from pipelines.config import DataConfig
from training.checkpoint import Checkpoints
from training.config import TrainConfig, config_hash
from training.config.encoder import EncoderConfig
from training.export import Trained, read_trained, to_onnx, to_safetensors, to_torchvision
from training.models.encoders import build_encoder
from training.models.torchvision_models import classifier_of
from training.run_folder import claim_run

SIZE = 64


def _config(name: str = "resnet8", **fields: Any) -> TrainConfig:
    data = DataConfig(train="somewhere", view={"size": SIZE})  # pyright: ignore[reportArgumentType]
    return TrainConfig(data=data, encoder=EncoderConfig(name=name, **fields))


def _trained(name: str, **fields: Any) -> Trained:
    """As after training: statistics of batch norm that differ from channel to channel."""
    config = _config(name, **fields)
    torch.manual_seed(0)
    encoder = build_encoder(config.encoder).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    randomise_statistics(encoder)
    return Trained(encoder.eval(), config, 7)


def _images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def _features(trained: Trained, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return trained.encoder(images)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("resnet18", "resnet18"),
        ("resnet50", "resnet50"),
        ("efficientnet-b0", "efficientnet_b0"),
        ("efficientnet-b5", "efficientnet_b5"),
        ("torchvision:convnext_tiny", "convnext_tiny"),
        ("torchvision:regnet_y_400mf", "regnet_y_400mf"),
        ("torchvision:squeezenet1_1", "squeezenet1_1"),
    ],
)
def test_torchvisions_own_class_loads_every_weight_and_gives_the_features(name: str, theirs: str) -> None:
    trained = _trained(name)
    state = torch.load(io.BytesIO(to_torchvision(trained)), weights_only=True)
    model = torchvision.models.get_model(theirs, weights=None).eval()
    model.load_state_dict(state, strict=True)
    # In float64, for layouts in memory differ, and so does the order of sums.
    images = _images(2).double()
    model.double()
    trained.encoder.double()
    assert not model(images).any()  # The classifier's weights are zeros.
    model.set_submodule(classifier_of(theirs), nn.Identity())
    with torch.no_grad():
        off = (model(images) - _features(trained, images)).norm() / _features(trained, images).norm()
    # B0's batch norms add 1e-3 to variances and torchvision's 1e-5: the file's, in float32, make up for it.
    assert off < (1e-6 if name == "efficientnet-b0" else 1e-9)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("resnet20", {}),
        ("plain18", {}),
        ("efficientnet", {"width": 1.1}),
        ("resnet18", {"stem": "cifar"}),
        ("resnet50", {"width": 2}),
    ],
)
def test_an_encoder_that_torchvision_has_not_is_refused_with_what_works(
    name: str, fields: dict[str, Any]
) -> None:
    with torch.device("meta"):
        config = _config(name, **fields)
        trained = Trained(build_encoder(config.encoder), config, 1)
    with pytest.raises(
        ValueError, match=r"torchvision.* has no .*; try --format safetensors or --format onnx"
    ):
        to_torchvision(trained)


@pytest.mark.parametrize("name", ["resnet8", "plain18", "efficientnet-b0"])
def test_safetensors_holds_every_weight_and_what_a_user_of_the_features_must_know(
    name: str, tmp_path: Path
) -> None:
    trained = _trained(name)
    (tmp_path / "encoder.safetensors").write_bytes(to_safetensors(trained))
    with safetensors.safe_open(tmp_path / "encoder.safetensors", "pt") as file:
        state, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    fresh = build_encoder(EncoderConfig(**json.loads(metadata["encoder"]))).eval()
    fresh.trunk.load_state_dict(state, strict=True)
    torch.testing.assert_close(fresh(_images(2)), _features(trained, _images(2)))
    assert metadata == {
        "encoder": json.dumps({"name": name}),
        "features": str(trained.encoder.dim),
        "size": "64",
        "mean": "[0.485, 0.456, 0.406]",
        "std": "[0.229, 0.224, 0.225]",
        "config_hash": config_hash(trained.config),
        "step": "7",
    }


# Float32 with other kernels: 1e-4 of the largest feature.
@pytest.mark.parametrize("name", ["resnet8", "plain20", "resnet18", "efficientnet-b0"])
def test_onnxruntime_gives_the_features_of_any_number_of_images(name: str) -> None:
    trained = _trained(name)
    content = to_onnx(trained)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        images = _images(count)
        (found,) = session.run(["features"], {"images": images.numpy()})
        expected = _features(trained, images)
        assert np.asarray(found).shape == (count, trained.encoder.dim)
        error = (torch.from_numpy(np.asarray(found)) - expected).abs().max()
        assert error < 1e-4 * expected.abs().max()
    assert session.get_modelmeta().custom_metadata_map == trained.metadata


def test_an_onnx_file_tells_nothing_of_the_machine_that_wrote_it() -> None:
    content = to_onnx(_trained("resnet8"))
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    assert b".py" not in content
    assert str(Path.home()).encode() not in content


def test_an_encoder_too_large_for_an_onnx_file_is_refused_with_what_works() -> None:
    config = _config("resnet152", width=4)
    with torch.device("meta"):
        trained = Trained(build_encoder(config.encoder), config, 1)
    with pytest.raises(
        ValueError, match=r"less than 2 GiB, and the encoder has 3\.\d; try --format safetensors"
    ):
        to_onnx(trained)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_package_that_is_not_there_is_named_with_how_to_install_it(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # So Python's own import fails.
    with pytest.raises(ValueError, match=f"needs {package}.*; install it with: pip install onnx onnxscript"):
        to_onnx(_trained("resnet8"))


def _save(run: str, steps: list[int]) -> dict[int, dict[str, torch.Tensor]]:
    """A run with other weights in the checkpoint of each step."""
    config = TrainConfig(data=_config().data, encoder=_config().encoder)
    claim_run(run, config)
    saved = {}
    for step in steps:
        torch.manual_seed(step)
        model = nn.ModuleDict({"encoder": build_encoder(config.encoder), "projector": nn.Linear(64, 8)})
        optimizer = torch.optim.SGD(model.parameters())
        Checkpoints(run, 9).save(step, model, optimizer, config)
        saved[step] = model["encoder"].state_dict()
    return saved


@pytest.mark.parametrize(("step", "expected"), [(None, 12), (4, 4), (12, 12)])
def test_the_newest_checkpoint_is_read_or_the_one_asked_for(
    tmp_path: Path, step: int | None, expected: int
) -> None:
    saved = _save(str(tmp_path / "run"), [4, 8, 12])
    trained = read_trained(str(tmp_path / "run/"), step)
    assert trained.step == expected
    assert not trained.encoder.training
    for key, value in trained.encoder.state_dict().items():
        assert torch.equal(value, saved[expected][key])


def test_a_checkpoint_or_a_run_that_is_not_there_is_refused(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    with pytest.raises(ValueError, match=re.escape(f"{run} is not a run: it has no config.toml")):
        read_trained(run, None)
    claim_run(run, _config())
    with pytest.raises(ValueError, match=re.escape(f"{run} has no checkpoint yet")):
        read_trained(run, None)
    _save(run, [4, 8])
    with pytest.raises(ValueError, match="no checkpoint of step 5; it has 4, 8"):
        read_trained(run, 5)
