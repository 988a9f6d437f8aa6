"""Finish cropped views: a whole batch at once on a GPU, in several threads on a CPU."""

import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pipelines.augment.draws import Draws
from pipelines.augment.effects import Effects
from pipelines.config import ViewRecipe

# Bytes of views that a thread finishes at a time. Fewer would fit its core's cache, but then the threads lose
# more by passing Python's lock around.
_PART_BYTES = 2**22


class Finisher:
    """Applies the effects of each recipe to its cropped views."""

    def __init__(self, recipes: tuple[ViewRecipe, ...], threads: int, gpu: int | None) -> None:
        self._recipes, self._gpu = recipes, gpu
        # torch.set_num_threads in the pool also affects threads that have not read the number yet: read it
        # here first, so that this thread keeps its own.
        torch.get_num_threads()
        self._pool = ThreadPoolExecutor(threads, "views", torch.set_num_threads, (1,))
        self._buffers = Buffers()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def finish(
        self, crops: Sequence[UInt8[Tensor, "n size size 3"]], draws: tuple[Draws, ...]
    ) -> tuple[Float[Tensor, "n 3 size size"], ...]:
        """The finished view of each crop, channels last in memory."""
        effects = [
            Effects(recipe, drawn, crop.device)
            for recipe, drawn, crop in zip(self._recipes, draws, crops, strict=True)
        ]
        if self._gpu is None:
            return self._finish_in_threads(crops, effects)
        views = (effect.apply(crop, slice(None)) for effect, crop in zip(effects, crops, strict=True))
        return tuple(view.contiguous(memory_format=torch.channels_last) for view in views)

    def _finish_in_threads(self, crops: Sequence[Tensor], effects: list[Effects]) -> tuple[Tensor, ...]:
        views = tuple(self._buffers.empty(crop.shape).permute(0, 3, 1, 2) for crop in crops)
        parts = []
        for effect, crop, view in zip(effects, crops, views, strict=True):
            step = max(1, _PART_BYTES // view[0].nbytes)
            parts += [(effect, crop, view, slice(row, row + step)) for row in range(0, len(crop), step)]
        for _ in self._pool.map(_finish, parts):
            pass  # Raises a thread's error.
        return views


def _finish(part: tuple[Effects, Tensor, Tensor, slice]) -> None:
    effects, crop, view, rows = part
    view[rows] = effects.apply(crop[rows], rows)


class Buffers:
    """Reuses the memory of float32 tensors: fresh memory costs a page fault for every 4 KiB."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def empty(self, shape: Sequence[int]) -> Tensor:
        """An uninitialised tensor; its memory is reused once no tensor refers to it."""
        size = prod(shape)
        fits = [place for place, buffer in enumerate(self._free) if len(buffer) >= size]
        buffer = self._free.pop(fits[0]) if fits else np.empty(size, np.float32)
        # torch keeps a reference to the array while a tensor uses it.
        lent = buffer[:size]
        weakref.finalize(lent, self._free.append, buffer).atexit = False
        return torch.from_numpy(lent).view(*shape)
