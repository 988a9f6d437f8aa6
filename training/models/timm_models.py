"""timm's models by name, without their classifiers."""

from difflib import get_close_matches
from types import ModuleType
from typing import Any

import torch
from torch import nn

from training.models.meta import on_meta
from training.models.torchvision_models import check_forward, stop_dropping


class NormAct(nn.Sequential):
    """A batch norm and the activation after it, which timm keeps in one module.

    Apart, the batch norm can be replaced by one over all workers' images.
    """


def timm_model(name: str, **arguments: Any) -> nn.Module:
    """timm's model, not pre-trained; ValueError where timm or the model is missing, with similar names."""
    timm = _timm(name)
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), 3) or ["convnext_tiny", "vit_small_patch16_224"]
        raise ValueError(f"timm has no model {name!r}; it has {', '.join(near)} and others")
    return timm.create_model(name, pretrained=False, **arguments)


def timm_trunk(name: str) -> tuple[nn.Module, int]:
    """The model without its classifier, and the width of its features.

    Dropout and stochastic depth are disabled, since a random generator's draws depend on the number of
    workers.
    """
    trunk: Any = timm_model(name, num_classes=0)
    stop_dropping(trunk)
    for module in trunk.modules():
        for rate in ("drop_prob", "drop_rate"):  # DropPath's; that of models which call F.dropout.
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    _split_norms(trunk)
    return trunk, trunk.head_hidden_size


def check_timm_size(name: str, size: int) -> None:
    """Raise ValueError if there is no such model, or it does not accept images of `size` pixels a side.

    Also where it gives no vector of features for an image, as models for other tasks.
    """
    trunk, dim = on_meta(lambda: timm_trunk(name))
    features = check_forward(trunk, name, size)
    if not isinstance(features, torch.Tensor) or features.shape != (2, dim):
        raise ValueError(f"timm's {name} does not turn an image into one vector; choose another encoder.name")


def blank_timm_model(name: str) -> nn.Module:
    """The model on the meta device, without memory for weights, where it supports that."""
    return on_meta(lambda: timm_model(name))


def _timm(name: str) -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"encoder.name=timm:{name} needs {error.name}; install it with: pip install timm"
        ) from error
    return timm


def _split_norms(trunk: nn.Module) -> None:
    """Replace each module that is a batch norm and an activation by a NormAct with the same tensors."""
    from timm.layers import BatchNormAct2d

    for parent in list(trunk.modules()):
        for name, child in parent.named_children():
            if isinstance(child, BatchNormAct2d):
                layer: Any = child  # timm does not declare the types of its parts.
                pair = NormAct()
                pair.add_module("norm", _plain_norm(layer))
                pair.add_module("drop", layer.drop)
                pair.add_module("act", layer.act)
                parent.add_module(name, pair)


def _plain_norm(original: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(original.num_features, original.eps, original.momentum, original.affine)
    norm.load_state_dict(original.state_dict(), strict=False, assign=True)
    return norm
