"""timm's models as encoders, and its weights in ours, against timm's own forward."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import randomise_statistics
from torch import Tensor, nn

from pipelines.config import DataConfig
from training.config import TrainConfig
from training.config.encoder import EncoderConfig
from training.export import Trained, to_safetensors, to_timm, to_torchvision
from training.gather import Gather, LocalGather, ProcessGroupGather
from training.models.batch_norm import synchronize_batch_norm
from training.models.encoders import build_encoder
from training.models.foreign_weights import read_weights
from training.models.timm_models import check_timm_size, timm_trunk

timm = pytest.importorskip("timm", reason="needs timm: pip install timm")

# Our encoder, and timm's name. Its batch norms have activations in efficientnet, mobilenetv3 and densenet.
_PAIRS = [
    ("resnet18", "resnet18"),
    ("resnet50", "resnet50"),
    ("efficientnet-b0", "efficientnet_b0"),
    ("timm:efficientnet_b0", "efficientnet_b0"),
    ("timm:mobilenetv3_small_050", "mobilenetv3_small_050"),
    ("timm:densenet121", "densenet121"),
    ("timm:convnext_atto", "convnext_atto"),
    ("timm:vit_tiny_patch16_224", "vit_tiny_patch16_224"),
]


def _theirs(name: str, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments)
    randomise_statistics(model)
    return model.eval()


def _images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def _difference(one: nn.Module, two: nn.Module, size: int) -> float:
    images = _images(size).double()
    with torch.no_grad():
        expected = two.double()(images)
        return float((one.double()(images) - expected).norm() / expected.norm())


@pytest.mark.parametrize(("name", "theirs"), _PAIRS)
def test_timms_weights_give_timms_features_and_go_back_to_timms_class(
    name: str, theirs: str, tmp_path: Path
) -> None:
    model: Any = _theirs(theirs)
    torch.save(model.state_dict(), tmp_path / "theirs.pt")
    trained = _trained(name)
    fit = read_weights(str(tmp_path / "theirs.pt"), trained.encoder)
    trained.encoder.trunk.load_state_dict(fit.tensors, strict=False)
    assert fit.complete, fit.summary

    back: Any = _theirs(theirs)
    back.load_state_dict(torch.load(io.BytesIO(to_timm(trained)), weights_only=True), strict=True)
    assert not any(weight.any() for weight in back.get_classifier().parameters())
    size = 224 if "vit" in name else 64
    for other in (model, back):
        other.reset_classifier(0)
        # timm's EfficientNets add 1e-5 to variances, ours 1e-3: variances in float32 make up for it.
        assert _difference(trained.encoder, other, size) < (1e-6 if name == "efficientnet-b0" else 1e-9)


def test_safetensors_of_a_timm_model_has_timms_names_and_gives_the_encoder_back(tmp_path: Path) -> None:
    from safetensors.torch import load

    trained = _trained("timm:mobilenetv3_small_050")
    (tmp_path / "encoder.safetensors").write_bytes(to_safetensors(trained))
    tensors = load((tmp_path / "encoder.safetensors").read_bytes())
    _theirs("mobilenetv3_small_050", num_classes=0).load_state_dict(tensors, strict=True)
    fit = read_weights(str(tmp_path / "encoder.safetensors"), trained.encoder)
    assert fit.complete
    for key, tensor in trained.encoder.trunk.state_dict().items():
        assert torch.equal(fit.tensors[key], tensor)


def _trained(name: str) -> Trained:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(name=name)).eval()
    randomise_statistics(encoder)
    data = DataConfig(train="somewhere", view={"size": 224})  # pyright: ignore[reportArgumentType]
    return Trained(encoder, TrainConfig(data=data, encoder=EncoderConfig(name=name)), 1)


@pytest.mark.parametrize(
    ("name", "format", "said"),
    [
        ("timm:resnet18", to_torchvision, "timm:resnet18 has timm's names of weights; try --format timm"),
        ("torchvision:resnet18", to_timm, "has torchvision's names of weights; try --format torchvision"),
        ("resnet8", to_timm, "timm has no resnet8; try --format safetensors"),
    ],
)
def test_an_export_by_names_that_the_network_has_not_is_refused(name: str, format: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        format(_trained(name))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "efficientnet_b0"])
def test_training_draws_no_random_numbers(name: str) -> None:
    trunk, dim = timm_trunk(name)
    before = torch.get_rng_state()
    with torch.no_grad():
        features = trunk.train()(_images(224))
    assert features.shape == (2, dim)
    assert torch.equal(torch.get_rng_state(), before)


def _train_step(name: str, gather: Gather) -> Tensor:
    """This worker's features of the batch, in training mode."""
    torch.manual_seed(0)
    model = synchronize_batch_norm(timm_trunk(name)[0].double(), gather).train()
    whole = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        return model(whole.chunk(gather.world_size)[gather.rank])


def _step_of_rank(name: str) -> Tensor:
    return _train_step(name, ProcessGroupGather())


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet18"])
def test_two_ranks_give_the_features_of_the_whole_batch(name: str, run_ranks: Callable) -> None:
    expected = _train_step(name, LocalGather())
    torch.testing.assert_close(torch.cat(run_ranks(_step_of_rank, 2, name)), expected, rtol=1e-8, atol=1e-8)


def test_an_unknown_model_or_a_size_that_it_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match="timm has no model 'convnext_atta'; it has convnext_atto"):
        timm_trunk("convnext_atta")
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 does not accept .*data.view.size=96 pixels"):
        check_timm_size("vit_tiny_patch16_224", 96)
    check_timm_size("vit_tiny_patch16_224", 224)


def test_a_config_without_timm_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # So Python's own import fails.
    with pytest.raises(ValueError, match=r"encoder.name=timm:resnet18 needs timm; .*: pip install timm"):
        TrainConfig(data=DataConfig(train="somewhere"), encoder=EncoderConfig(name="timm:resnet18"))
