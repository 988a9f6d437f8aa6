"""torchvision's models, their classifier cut off, against torchvision's own layers."""

from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from training.config.encoder import EncoderConfig
from training.models.encoders import build_encoder
from training.models.torchvision_models import check_size, classifier_of, torchvision_trunk

# One of each family, with the width of its penultimate layer as its paper or torchvision's source has it.
FAMILIES = {
    "alexnet": 4096,
    "convnext_tiny": 768,
    "densenet121": 1024,
    "efficientnet_v2_s": 1280,
    "googlenet": 1024,
    "inception_v3": 2048,
    "maxvit_t": 512,
    "mnasnet0_5": 1280,
    "mobilenet_v2": 1280,
    "mobilenet_v3_small": 1024,
    "regnet_y_400mf": 440,
    "resnext50_32x4d": 2048,
    "shufflenet_v2_x0_5": 1024,
    "squeezenet1_1": 512,
    "swin_t": 768,
    "swin_v2_t": 768,
    "vgg11_bn": 4096,
    "vit_b_32": 768,
    "wide_resnet50_2": 2048,
}


@pytest.mark.parametrize(("name", "width"), FAMILIES.items())
def test_features_are_as_wide_as_the_layer_before_the_classifier(name: str, width: int) -> None:
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        trunk, dim = torchvision_trunk(name)
        features = trunk(torch.empty(2, 3, 224, 224))
    assert features.shape == (2, dim) == (2, width)


@pytest.mark.parametrize("name", ["convnext_tiny", "mobilenet_v3_small", "regnet_y_400mf"])
def test_features_are_what_torchvisions_classifier_gets(name: str) -> None:
    encoder = build_encoder(EncoderConfig(name=f"torchvision:{name}")).eval()
    theirs: Any = torchvision.models.get_model(name, weights=None).eval()
    theirs.load_state_dict(encoder.trunk.state_dict(), strict=False)
    seen = []
    theirs.get_submodule(classifier_of(name)).register_forward_pre_hook(
        lambda _m, inputs: seen.extend(inputs)
    )
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs(images)
        assert torch.equal(encoder(images), seen[0])


@pytest.mark.parametrize("name", ["convnext_tiny", "mobilenet_v3_small", "resnet18", "vgg11_bn"])
def test_all_but_the_classifier_is_kept(name: str) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None)
        trunk, _ = torchvision_trunk(name)
    missing = set(theirs.state_dict()) - set(trunk.state_dict())
    last = [path for path, module in theirs.named_modules() if isinstance(module, nn.Linear)][-1]
    assert missing == {f"{last}.weight", f"{last}.bias"}


def test_nothing_is_dropped_while_training() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(name="torchvision:convnext_tiny"))
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(encoder(images), encoder(images))


def test_an_unknown_model_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="no classification model 'convnext_tine'; it has convnext_tiny"):
        torchvision_trunk("convnext_tine")


def test_images_of_a_size_that_a_model_cannot_take_are_refused() -> None:
    with pytest.raises(ValueError, match=r"vit_b_16 does not accept images of data.view.size=96 .*; try 224"):
        check_size("vit_b_16", 96)
    with pytest.raises(
        ValueError, match=r"inception_v3 does not accept images of data.view.size=32 .*; try 2"
    ):
        check_size("inception_v3", 32)
    check_size("vit_b_16", 224)
    check_size("convnext_tiny", 32)
