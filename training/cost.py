"""What an encoder weighs, and what an image costs it."""

from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from training.encoder_config import EncoderConfig
from training.encoders import build_encoder


class Cost(NamedTuple):
    """Parameters, and multiply-adds for one image; without a classifier."""

    parameters: int
    multiply_adds: int


def encoder_cost(config: EncoderConfig, size: int, device: str = "meta") -> Cost:
    """The cost of the encoder with images of `size` pixels a side.

    On the device "meta" no arithmetic is done; on "cpu" an image is encoded, and random numbers are drawn.
    """
    with torch.device(device):
        encoder = build_encoder(config).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder(torch.empty(1, 3, size, size))
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    return Cost(parameters, counter.get_total_flops() // 2)  # A multiply-add counts as two.
