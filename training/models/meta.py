"""Models without memory for weights, to compare and to check."""

from collections.abc import Callable
from typing import TypeVar

import torch

_T = TypeVar("_T")


def on_meta(build: Callable[[], _T]) -> _T:
    """The result of `build`, on torch's meta device where it can be built there."""
    try:
        with torch.device("meta"):
            return build()
    except NotImplementedError:  # torchvision's RegNets, as some others, compute their widths with tensors.
        return build()
