"""Weights of other libraries in our encoders, whose features are compared with the library's network's.

The checkpoints have the entries and prefixes of the sources that `weight_names` names.
"""

import socket
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from counting import randomise_statistics
from folders import digit_folders
from torch import Tensor, nn

from cluster.cli.main import main
from cluster.train import say_fit
from pipelines.config import DataConfig
from pipelines.index import build_index
from training.config import TrainConfig
from training.config.encoder import EncoderConfig
from training.export import Trained, to_safetensors, to_torchvision
from training.gather import LocalGather
from training.initial import find_initial, is_foreign, load_initial
from training.models.encoders import Encoder, build_encoder
from training.models.foreign_weights import Fit, read_weights
from training.models.torchvision_models import classifier_of
from training.objective_builder import build_objective

# Parameters and running statistics of a ResNet-18 without its classifier: 20 convolutions, 20 batch norms.
_TENSORS = 20 + 20 * 4


def _theirs(name: str = "resnet18", seed: int = 0) -> nn.Module:
    """torchvision's network, with statistics as after training."""
    torch.manual_seed(seed)
    model = torchvision.models.get_model(name, weights=None)
    randomise_statistics(model)
    return model.eval()


def _prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def _numbered(model: nn.Module) -> dict[str, Tensor]:
    return nn.Sequential(*list(model.children())[:-1]).state_dict()


_State = dict[str, Tensor]

# What each writes, of the network that is wanted and another that is in the same file.
_CHECKPOINTS: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "torchvision": lambda model, _: model.state_dict(),
    "DistributedDataParallel": lambda model, _: _prefixed("module.", model.state_dict()),
    "torch.compile": lambda model, _: _prefixed("_orig_mod.", model.state_dict()),
    "MoCo": lambda model, other: {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": _prefixed("module.encoder_q.", model.state_dict())
        | _prefixed("module.encoder_k.", other.state_dict())
        | {"module.queue": torch.zeros(128, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.long)},
    },
    "MoCo v3": lambda model, other: {
        "state_dict": _prefixed("module.base_encoder.", model.state_dict())
        | _prefixed("module.momentum_encoder.", other.state_dict())
    },
    "SimSiam": lambda model, _: {
        "state_dict": _prefixed("module.encoder.", model.state_dict())
        | {"module.predictor.0.weight": torch.zeros(8, 8)}
    },
    "DINO": lambda model, other: {
        "student": _prefixed("module.backbone.", other.state_dict()),
        "teacher": _prefixed("backbone.", model.state_dict()) | {"head.mlp.0.weight": torch.zeros(8, 8)},
        "args": Namespace(arch="resnet18", lr=0.0005),
    },
    "solo-learn": lambda model, other: {
        "hyper_parameters": {"method": "mocov2plus"},
        "state_dict": _prefixed("backbone.", model.state_dict())
        | _prefixed("momentum_backbone.", other.state_dict()),
    },
    "older solo-learn": lambda model, _: {"state_dict": _prefixed("encoder.", model.state_dict())},
    "lightly": lambda model, other: {
        "state_dict": _prefixed("backbone.", _numbered(model))
        | _prefixed("backbone_momentum.", _numbered(other))
    },
    "lightly's DINO": lambda model, other: {
        "state_dict": _prefixed("student_backbone.", _numbered(other))
        | _prefixed("teacher_backbone.", _numbered(model))
    },
}


def _encoder(name: str, **fields: Any) -> Encoder:
    torch.manual_seed(1)
    return build_encoder(EncoderConfig(name=name, **fields)).eval()


def _load(encoder: Encoder, place: str) -> Fit:
    fit = read_weights(place, encoder)
    encoder.trunk.load_state_dict(fit.tensors, strict=False)
    return fit


def _difference(encoder: Encoder, model: nn.Module, classifier: str) -> float:
    """Between the features, relative to their size, in float64."""
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    model.set_submodule(classifier, nn.Identity())
    with torch.no_grad():
        expected = model.double()(images)
        return float((encoder.double()(images) - expected).norm() / expected.norm())


@pytest.mark.parametrize("writer", _CHECKPOINTS)
def test_features_are_those_of_the_network_that_the_checkpoint_is_of(writer: str, tmp_path: Path) -> None:
    model, encoder = _theirs(), _encoder("resnet18")
    torch.save(_CHECKPOINTS[writer](model, _theirs(seed=2)), tmp_path / "theirs.pth.tar")
    fit = _load(encoder, str(tmp_path / "theirs.pth.tar"))
    assert fit.complete
    assert f"{_TENSORS} of the encoder's {_TENSORS} tensors fit" in fit.summary
    assert _difference(encoder, model, "fc") < 1e-9


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("resnet50", "resnet50"),
        ("efficientnet-b0", "efficientnet_b0"),
        ("efficientnet-b5", "efficientnet_b5"),
        ("torchvision:mobilenet_v3_small", "mobilenet_v3_small"),
        ("torchvision:densenet121", "densenet121"),
    ],
)
def test_a_safetensors_file_with_torchvisions_names_gives_torchvisions_features(
    name: str, theirs: str, tmp_path: Path
) -> None:
    model, encoder = _theirs(theirs), _encoder(name)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "theirs.safetensors")
    assert _load(encoder, str(tmp_path / "theirs.safetensors")).complete
    # B0's batch norms add 1e-5 to variances, ours 1e-3: variances in float32 make up for it.
    assert _difference(encoder, model, classifier_of(theirs)) < (1e-6 if name == "efficientnet-b0" else 1e-9)


def test_torchvisions_efficientnets_add_to_variances_what_ours_make_up_for() -> None:
    from training.models.weight_names import namings

    for number in range(8):
        with torch.device("meta"):
            model = torchvision.models.get_model(f"efficientnet_b{number}", weights=None)
            trunk = build_encoder(EncoderConfig(name=f"efficientnet-b{number}")).trunk
        (theirs,), (ours,) = ({m.eps for m in net.modules() if isinstance(m, nn.BatchNorm2d)}
                              for net in (model, trunk))  # fmt: skip
        assert next(namings(trunk)).shift == pytest.approx(theirs - ours)


@pytest.mark.parametrize("name", ["resnet8", "efficientnet-b0"])
@pytest.mark.parametrize("kind", ["export.safetensors", "export.pt", "renamed.pt", "average.pt"])
def test_our_own_files_give_the_encoder_back(name: str, kind: str, tmp_path: Path) -> None:
    first = _encoder(name)
    randomise_statistics(first)
    data = DataConfig(train="somewhere", view={"size": 64})  # pyright: ignore[reportArgumentType]
    trained = Trained(first, TrainConfig(data=data, encoder=EncoderConfig(name=name)), 1)
    place, state = tmp_path / kind, _prefixed("encoder.trunk.", first.trunk.state_dict())
    if kind == "export.safetensors":
        place.write_bytes(to_safetensors(trained))
    elif kind == "renamed.pt":
        torch.save({"step": 1, "model": state}, place)
    elif kind == "average.pt":
        other = _prefixed("encoder.trunk.", _encoder(name).trunk.state_dict())
        torch.save({"model": other, "average": _prefixed("module.", state)}, place)
    elif name == "resnet8":
        pytest.skip("torchvision has no ResNet-8")
    else:
        place.write_bytes(to_torchvision(trained))
    again = _encoder(name)
    assert _load(again, str(place)).complete
    for key, tensor in first.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], tensor, rtol=0, atol=1e-7)


def test_what_does_not_fit_is_named_and_keeps_its_first_weights(tmp_path: Path) -> None:
    model, encoder = _theirs(), _encoder("resnet18", stem="cifar")
    state = model.state_dict()
    del state["bn1.weight"]
    first = encoder.trunk.conv1.weight.clone()
    torch.save(state | {"conv9.weight": torch.zeros(1)}, tmp_path / "theirs.pt")
    fit = _load(encoder, str(tmp_path / "theirs.pt"))
    assert not fit.complete
    assert fit.summary == (
        f"{tmp_path}/theirs.pt: {_TENSORS - 2} of the encoder's {_TENSORS} tensors fit (plain names); not in "
        "the file: bn1.weight; of another shape: conv1.weight 64x3x7x7, not 64x3x3x3; "
        "not used: fc.weight, fc.bias, conv9.weight"
    )
    assert torch.equal(encoder.trunk.conv1.weight, first)
    assert torch.equal(encoder.trunk.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, [1, 2], "resnet34", "resnet50", "mobilenet_v2"])
def test_a_file_of_another_network_or_of_none_is_refused_in_one_line(content: Any, tmp_path: Path) -> None:
    state = _theirs(content).state_dict() if isinstance(content, str) else content
    torch.save(state, tmp_path / "theirs.pt")
    with pytest.raises(ValueError, match=rf"theirs.pt: \d+ of the encoder's {_TENSORS} tensors fit") as error:
        read_weights(str(tmp_path / "theirs.pt"), _encoder("resnet18"))
    assert "\n" not in str(error.value)
    assert "set --encoder to the network that the weights are of" in str(error.value)


class _Hyperparameters:
    """An object that a file would have to run code to make."""


def test_a_file_that_could_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": _Hyperparameters()}, tmp_path / "theirs.ckpt")
    with pytest.raises(ValueError, match="could run code; if you trust it, save its weights alone"):
        read_weights(str(tmp_path / "theirs.ckpt"), _encoder("resnet8"))


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_file_is_named(ending: str, damage: str, tmp_path: Path) -> None:
    place = tmp_path / f"theirs.{ending}"
    state = _encoder("resnet8").trunk.state_dict()
    if ending == "pt":
        torch.save(state, place)
    else:
        safetensors.torch.save_file(state, place)
    content = {"cut": place.read_bytes()[:-100], "empty": b"", "text": b"<html>404</html>"}[damage]
    place.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{place} is damaged: .*; fetch it again"):
        read_weights(str(place), _encoder("resnet8"))


def test_a_flipped_bit_of_a_weight_is_noticed(tmp_path: Path) -> None:
    place = tmp_path / "theirs.pt"
    torch.save(_encoder("resnet8").trunk.state_dict(), place)
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 1
    place.write_bytes(content)
    with pytest.raises(ValueError, match=r"theirs.pt is damaged: wrong checksum of .*; fetch it again"):
        read_weights(str(place), _encoder("resnet8"))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"there is no file {tmp_path}/x.pth; give --init a run"):
        read_weights(f"{tmp_path}/x.pth", _encoder("resnet8"))


def test_files_and_libraries_are_told_from_runs_and_their_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    foreign = ["torchvision:resnet50", "a.pt", "s3://b/moco.pth.tar", "a.safetensors", "b/last.ckpt"]
    ours = ["runs/first", "runs/first/checkpoints/step-000000007.pt", "s3://b/runs/x"]
    assert [is_foreign(place) for place in foreign + ours] == [True] * len(foreign) + [False] * len(ours)
    assert find_initial("torchvision:resnet50", print) == "torchvision:resnet50"
    assert find_initial("a.pth", print) == f"{tmp_path}/a.pth"
    assert find_initial("s3://b/moco.pth.tar", print) == "s3://b/moco.pth.tar"
    with pytest.raises(ValueError, match="runs/first has no checkpoint"):
        find_initial("runs/first", print)


def test_torchvisions_weights_come_from_torch_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, encoder = _theirs(), _encoder("resnet18")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    known: Any = torchvision.models.get_model_weights("resnet18")
    torch.save(model.state_dict(), cache / Path(known.DEFAULT.url).name)
    assert _load(encoder, "torchvision:resnet18").complete
    assert _difference(encoder, model, "fc") < 1e-9


def test_a_download_that_fails_is_named_with_what_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with socket.socket() as bound:  # It does not listen, so connections to its port are refused.
        bound.bind(("127.0.0.1", 0))
        for name in ("https_proxy", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{bound.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        said = r"https://.*/resnet18-.* could not be downloaded: .*refused.*; fetch it elsewhere and give"
        with pytest.raises(ValueError, match=said):
            read_weights("torchvision:resnet18", _encoder("resnet18"))


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("torchvision:resnet19", "torchvision has no weights of 'resnet19'"),
        ("timm:resnet18", r"save timm's by torch.save\(timm.create_model\('resnet18', pretrained=True\)"),
    ],
)
def test_a_library_that_offers_no_such_weights_is_named(place: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_weights(place, _encoder("resnet18"))


def test_torchvision_has_an_address_for_the_weights_of_the_models_that_we_have() -> None:
    for name in ("resnet18", "resnet50", "resnet152", "efficientnet_b0", "efficientnet_b7"):
        weights = torchvision.models.get_model_weights(name).DEFAULT
        assert weights.url.startswith("https://download.pytorch.org/models/")


def test_a_command_whose_weights_do_not_fit_ends_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = digit_folders(tmp_path / "images", 24)
    torch.save(_theirs("mobilenet_v2").state_dict(), tmp_path / "theirs.pt")
    with pytest.raises(SystemExit) as ended:
        main(
            ["train", "--data.train", str(images), "--data.view.size", "32", "--encoder.name", "resnet18",
             "--batch-size", "8", "--init", str(tmp_path / "theirs.pt"), "--output", str(tmp_path / "runs")]
        )  # fmt: skip
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"diptych: {tmp_path}/theirs.pt: ")
    assert not (tmp_path / "runs").exists()


def test_a_run_starts_from_the_files_weights_and_says_what_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, model = digit_folders(tmp_path / "images", 24), _theirs()
    torch.save(model.state_dict(), tmp_path / "theirs.pt")
    data = DataConfig(train=str(images))
    encoder = EncoderConfig(name="resnet18")
    config = TrainConfig(data=data, encoder=encoder, init=str(tmp_path / "theirs.pt"))
    objective: Any = build_objective(config, build_index(data.train, data), LocalGather()).eval()
    assert _difference(objective.encoder, model, "fc") < 1e-9
    say_fit(load_initial(_encoder("resnet18"), str(tmp_path / "theirs.pt")))
    whole = capsys.readouterr()
    say_fit(load_initial(_encoder("resnet18", stem="cifar"), str(tmp_path / "theirs.pt")))
    partial = capsys.readouterr()
    assert (whole.err, partial.out) == ("", "")
    assert "100 of the encoder's 100 tensors fit" in whole.out
    assert "warning: " in partial.err
    assert "99 of the encoder's 100 tensors fit" in partial.err
