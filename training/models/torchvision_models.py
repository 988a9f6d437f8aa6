"""torchvision's classification models by name, without their classifiers."""

from difflib import get_close_matches
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.ops import StochasticDepth

from training.models.meta import on_meta

# Without auxiliary classifiers, with which these models return a tuple in training.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}

_DROPPING = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    StochasticDepth,
)  # fmt: skip


def torchvision_model(name: str, **arguments: Any) -> nn.Module:
    """torchvision's model, not pre-trained; ValueError, with similar names, where there is none."""
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        near = get_close_matches(name, names, 3) or ["convnext_tiny", "regnet_y_400mf", "vit_b_16"]
        raise ValueError(
            f"torchvision has no classification model {name!r}; it has {', '.join(near)} and others"
        )
    return torchvision.models.get_model(name, weights=None, **ARGUMENTS.get(name, {}), **arguments)


def torchvision_trunk(name: str) -> tuple[nn.Module, int]:
    """The model without its classifier, and the width of its features.

    Dropout is disabled, since a random generator's draws depend on the number of workers.
    """
    trunk = torchvision_model(name)
    stop_dropping(trunk)
    path = classifier_of(name)
    classifier: Any = trunk.get_submodule(path)
    trunk.set_submodule(path, nn.Identity())
    return trunk, classifier.in_features if isinstance(classifier, nn.Linear) else classifier.in_channels


def stop_dropping(trunk: nn.Module) -> None:
    """Set the probabilities of dropout and stochastic depth to 0."""
    for module in trunk.modules():
        if isinstance(module, _DROPPING):
            module.p = 0.0


def classifier_of(name: str) -> str:
    """Dotted name of the layer whose weights' shape depends on the number of classes."""
    ten, eleven = (blank_model(name, num_classes=classes).state_dict() for classes in (10, 11))
    layers = {key.rpartition(".")[0] for key in ten if ten[key].shape != eleven[key].shape}
    assert len(layers) == 1, f"{name} has the classifiers {layers}"
    return layers.pop()


def check_size(name: str, size: int) -> None:
    """Raise ValueError if there is no such model, or it does not accept images of `size` pixels a side."""
    check_forward(blank_model(name), name, size)


def check_forward(model: nn.Module, name: str, size: int) -> Any:
    """The model's output for two images of `size` pixels a side; ValueError if it does not accept them."""
    try:
        return model(torch.empty(2, 3, size, size, device=next(model.parameters()).device))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name} does not accept images of data.view.size={size} pixels: {reason}; try 224"
        ) from error


def blank_model(name: str, **arguments: Any) -> nn.Module:
    """The model on the meta device, without memory for weights, where it supports that."""
    return on_meta(lambda: torchvision_model(name, **arguments))
