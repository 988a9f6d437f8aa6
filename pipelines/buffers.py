"""Memory for batch after batch of views on a CPU: used again once no tensor has it any more."""

import weakref
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor


class Buffers:
    """Hands out float32 tensors. Fresh memory would cost a page fault for every four kilobytes."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def empty(self, shape: Sequence[int]) -> Tensor:
        """A tensor of undefined content; its memory comes back when the last tensor that shares it goes."""
        size = prod(shape)
        fits = [place for place, buffer in enumerate(self._free) if len(buffer) >= size]
        buffer = self._free.pop(fits[0]) if fits else np.empty(size, np.float32)
        # torch holds on to the array that it is given, as long as there is a tensor of it.
        lent = buffer[:size]
        weakref.finalize(lent, self._free.append, buffer).atexit = False
        return torch.from_numpy(lent).view(*shape)
