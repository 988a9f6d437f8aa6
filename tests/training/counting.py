"""What an encoder weighs, what it costs without its arithmetic being done, and what its layers give."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from training.config.encoder import EncoderConfig
from training.models.encoders import build_encoder


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def with_classifier(config: EncoderConfig, size: int, classes: int = 1000) -> tuple[int, float]:
    """Parameters, and multiply-adds for one image, of the encoder and a linear classifier."""
    with torch.device("meta"):
        encoder = build_encoder(config)
        model = nn.Sequential(encoder, nn.Linear(encoder.dim, classes)).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, size, size))
    return parameters(model), counter.get_total_flops() / 2  # A multiply-add counts as two.


def layer_outputs(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output of every convolution and batch norm by its name."""
    outputs = {}

    def keep(name: str) -> Callable:
        # A copy: the activation that follows may work in place.
        return lambda _module, _inputs, out: outputs.update({name: out.clone()})

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return outputs


def randomise_statistics(model: nn.Module) -> None:
    """Batch norms as after training, which in evaluation do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
