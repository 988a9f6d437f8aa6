"""Encoded images and their draws to normalised views with DALI, on the CPU or the GPU.

DALI draws nothing itself: every choice comes in as an argument, so a view is the same on any device.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
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

# Takes a request and, by its position, why each of its images cannot be decoded; gives one without them.
Repair = Callable[[Request, dict[int, str]], Request]


def make_views(
    requests: Iterator[Request],
    recipes: tuple[ViewRecipe, ...],
    *,
    batch_size: int,
    threads: int,
    gpu: int | None = None,
    repair: Repair | None = None,
) -> Iterator[Made]:
    """One (view per recipe, tag) for each request, in order; no request has more than batch_size images.

    Views are channels last in memory. Where images of a request cannot be decoded, the request that `repair`
    makes of it takes its place, as often as it takes. Raises RuntimeError where there is no `repair`.
    """
    settings = _Settings(recipes, batch_size, threads, gpu)
    maker = _Maker(requests, settings, _PREFETCH)
    mender = _Mender(settings, repair) if repair else None
    while True:
        try:
            made = maker.next()
        except _RequestError as failure:
            if mender is None:
                raise failure.reason from None
            made = mender.make(failure)
        if made is None:
            return
        yield made


@dataclass(frozen=True)
class _Settings:
    recipes: tuple[ViewRecipe, ...]
    batch_size: int
    threads: int
    gpu: int | None

    @property
    def pipeline(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "num_threads": self.threads, "device_id": self.gpu}


class _RequestError(Exception):
    """A request that DALI failed to make, and why."""

    def __init__(self, request: Request, reason: RuntimeError) -> None:
        super().__init__(str(reason))
        self.request, self.reason = request, reason


class _Source:
    """What DALI calls for its inputs; it holds the requests that are being worked on, oldest first."""

    def __init__(self, requests: Iterator[Request], recipes: tuple[ViewRecipe, ...]) -> None:
        self._requests, self._recipes = requests, recipes
        # DALI copies nothing that it is given, so all of it is held until the views have come back.
        self._held: deque[tuple[Request, list[Any]]] = deque()
        self.error: Exception | None = None

    def __call__(self) -> list[Any]:
        try:
            request = next(self._requests)
        except StopIteration:
            raise
        except Exception as error:
            # Raised once the requests before it have been made, and never taken for an error of DALI's.
            self.error = error
            raise StopIteration from None
        arguments = [request.images, *_arguments(request, self._recipes)]
        self._held.append((request, arguments))
        return arguments

    def release(self) -> Request:
        """The oldest request; DALI is done with it."""
        return self._held.popleft()[0]


class _Maker:
    """A pipeline that makes requests, in order."""

    def __init__(self, requests: Iterator[Request], settings: _Settings, prefetch: int) -> None:
        self._source = _Source(requests, settings.recipes)
        gpu = settings.gpu is not None
        self._pipeline = _build(
            settings.recipes, self._source, gpu, prefetch_queue_depth=prefetch, **settings.pipeline
        )
        self._pipeline.build()

    def next(self) -> Made | None:
        """The oldest request's views, or None after the last. After _RequestError it can go on."""
        try:
            outputs = self._pipeline.run()
        except StopIteration:
            if self._source.error:
                raise self._source.error from None
            return None
        except RuntimeError as error:
            # A failure comes up in its request's turn, however far the pipeline has worked ahead.
            raise _RequestError(self._source.release(), error) from None
        # No copies: DALI keeps a batch's memory for as long as there is a tensor of it.
        views = tuple(torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2) for output in outputs)
        return views, self._source.release().tag


class _Mender:
    """Makes requests that failed without their broken images; its pipelines are built when first needed."""

    def __init__(self, settings: _Settings, repair: Repair) -> None:
        self._settings, self._repair = settings, repair
        self._waiting: deque[Request] = deque()

    def make(self, failure: _RequestError) -> Made:
        """The views of what `repair` makes of the request; RuntimeError where its images are not to blame."""
        while True:
            reasons = self._undecodable(failure.request.images)
            if not reasons:
                raise failure.reason
            self._waiting.append(self._repair(failure.request, reasons))
            try:
                made = self._maker.next()
            except _RequestError as again:
                failure = again
                continue
            assert made
            return made

    def _undecodable(self, images: Sequence[UInt8[np.ndarray, " bytes"]]) -> dict[int, str]:
        """Why each image that cannot be decoded cannot, by its position."""
        reasons = {}
        for position, image in enumerate(images):
            try:
                self._decoder.run(image=[image])
            except RuntimeError as error:
                reasons[position] = _first_line(error)
        return reasons

    @cached_property
    def _maker(self) -> _Maker:
        return _Maker(iter(self._waiting.popleft, None), self._settings, prefetch=1)

    @cached_property
    def _decoder(self) -> Any:
        settings = self._settings.pipeline | {"batch_size": 1, "num_threads": 1}
        decoder = _build_decoder(self._settings.gpu is not None, prefetch_queue_depth=1, **settings)
        decoder.build()
        return decoder


def _first_line(error: RuntimeError) -> str:
    """What an operator of DALI's says went wrong, out of a message that names the operator and its place."""
    lines = str(error).rpartition("encountered:")[2].split("\n")
    return next((line.strip() for line in lines if line.strip()), "unknown")


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
    images = _decoded(inputs.pop(0), gpu)
    views = []
    for recipe, count in zip(recipes, counts):  # noqa: B905 - DALI's compiler knows no strict=
        arguments, inputs = inputs[:count], inputs[count:]
        views.append(_view(images, recipe, gpu, *arguments))
    return tuple(views)


@pipeline_def
def _build_decoder(gpu: bool) -> Any:
    return _decoded(fn.external_source(name="image"), gpu)


def _decoded(encoded: Any, gpu: bool) -> Any:
    return fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=DALIImageType.RGB)


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
        output_layout="HWC",
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
