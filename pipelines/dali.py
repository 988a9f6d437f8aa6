"""Encoded images and their draws to normalised views with DALI, on the CPU or the GPU.

DALI draws nothing itself: every choice comes in as an argument, so a view is the same on any device.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from nvidia.dali import fn, math, pipeline_def
from nvidia.dali.types import DALIDataType, DALIImageType  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor

from pipelines.colour import colour_matrices
from pipelines.draws import Draws
from pipelines.recipes import ViewRecipe

# Batches that DALI works on ahead of the one that is asked for.
_PREFETCH = 2


@dataclass(frozen=True, eq=False)
class Request:
    """One batch to make views of: the encoded bytes of each image, and the draws of each view.

    `tag` comes back with the views.
    """

    images: Sequence[UInt8[np.ndarray, " bytes"]]
    draws: tuple[Draws, ...]
    tag: Any = None


Made = tuple[tuple[Float[Tensor, "n 3 size size"], ...], Any]


def make_views(
    requests: Iterator[Request],
    recipes: tuple[ViewRecipe, ...],
    *,
    batch_size: int,
    threads: int,
    gpu: int | None = None,
) -> Iterator[Made]:
    """One (view per recipe, tag) for each request, in order; no request has more than batch_size images.

    Raises RuntimeError where an image cannot be decoded.
    """
    # DALI copies nothing that it is given, so each request is held until its views have come back.
    held: deque[Request] = deque()

    def feed() -> list[Any]:
        request = next(requests)
        held.append(request)
        return [request.images, *_arguments(request, recipes)]

    pipeline = _build(
        recipes,
        feed,
        gpu is not None,
        batch_size=batch_size,
        num_threads=threads,
        device_id=gpu,
        prefetch_queue_depth=_PREFETCH,
    )
    pipeline.build()
    while True:
        try:
            outputs = pipeline.run()
        except StopIteration:
            return
        # A copy of our own: DALI writes later batches into the same memory.
        views = tuple(torch.from_dlpack(output.as_tensor()).clone() for output in outputs)
        yield views, held.popleft().tag


def _arguments(request: Request, recipes: tuple[ViewRecipe, ...]) -> Iterator[Any]:
    """What _view takes for each view, in its order."""
    for recipe, draws in zip(recipes, request.draws, strict=True):
        top, left, height, width = draws.box.T
        right, left = np.where(draws.flip, left, left + width), np.where(draws.flip, left + width, left)
        yield np.stack([top, left], axis=1).astype(np.float32)
        yield np.stack([top + height, right], axis=1).astype(np.float32)
        if _colours(recipe):
            yield from colour_matrices(draws)
        if recipe.blur:
            yield draws.blur
            yield [_blur_kernel(sigma, recipe.size) for sigma in draws.sigma]


def _colours(recipe: ViewRecipe) -> bool:
    return bool(recipe.jitter or recipe.grey)


def _blur_kernel(sigma: float, size: int) -> Float[np.ndarray, "taps 1"]:
    """A Gaussian, as wide as a tenth of the view, without the taps beyond three sigma that add nothing."""
    widest = max(1, size // 10) // 2
    reach = min(widest, int(np.ceil(3 * sigma)))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return (taps / taps.sum()).astype(np.float32)[:, None]


@pipeline_def(enable_conditionals=True)
def _build(recipes: tuple[ViewRecipe, ...], feed: Any, gpu: bool) -> Any:
    counts = [2 + 2 * _colours(recipe) + 2 * bool(recipe.blur) for recipe in recipes]
    inputs = list(fn.external_source(source=feed, num_outputs=1 + sum(counts), no_copy=True))
    images = fn.decoders.image(inputs.pop(0), device="mixed" if gpu else "cpu", output_type=DALIImageType.RGB)
    views = []
    for recipe, count in zip(recipes, counts):  # noqa: B905 - DALI's compiler knows no strict=
        arguments, inputs = inputs[:count], inputs[count:]
        views.append(_view(images, recipe, gpu, *arguments))
    return tuple(views)


def _view(images: Any, recipe: ViewRecipe, gpu: bool, start: Any, end: Any, *arguments: Any) -> Any:
    """The graph of one view: crop, resize and flip in one step, then colour, then blur."""
    # A region whose end lies left of its start comes out flipped. Where it is scaled down, the filter also
    # reads the pixels just outside the region, which a crop followed by a resize would not.
    view: Any = fn.resize(
        images,
        size=[recipe.size, recipe.size],
        roi_start=start,
        roi_end=end,
        antialias=True,
        dtype=DALIDataType.FLOAT,
    )
    if _colours(recipe):
        view = _coloured(view, arguments[0], arguments[1], gpu)
    if recipe.blur:
        view = _blurred(view, arguments[-2], arguments[-1], gpu)
    return fn.crop_mirror_normalize(
        view,
        mean=[255 * mean for mean in recipe.mean],
        std=[255 * std for std in recipe.std],
        output_layout="CHW",
    )


def _coloured(view: Any, pixel: Any, mean: Any, gpu: bool) -> Any:
    shift = fn.coord_transform(fn.reductions.mean(view, axes=[0, 1], keep_dims=True), M=mean)
    if gpu:  # An argument such as T has to lie in the CPU's memory.
        return math.clamp(fn.coord_transform(view, M=pixel) + shift, 0.0, 255.0)
    return math.clamp(fn.coord_transform(view, M=pixel, T=fn.reshape(shift, shape=[3])), 0.0, 255.0)


def _blurred(view: Any, wanted: Any, kernel: Any, gpu: bool) -> Any:
    if wanted:
        taps = kernel.gpu() if gpu else kernel
        blurred = fn.filter(fn.filter(view, taps), fn.transpose(taps, perm=[1, 0]))
    else:
        blurred = view
    return blurred
