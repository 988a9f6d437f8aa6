"""Labels of any size, as classes 0, 1, ... that a classifier can have."""

import torch
from jaxtyping import Int
from torch import Tensor


def class_numbers(labels: Int[Tensor, " n"], values: Int[Tensor, " classes"]) -> Int[Tensor, " n"]:
    """Each label's place among `values`, ascending, or -1; without values the labels themselves."""
    if not len(values):
        return labels
    places = torch.searchsorted(values, labels).clamp_max(len(values) - 1)
    return torch.where(values[places] == labels, places, -1)
