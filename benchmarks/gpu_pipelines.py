"""DALI's pipelines as gpu_views.py times them: a call of each gives a batch of images, again and again."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from pipelines.arguments import view_arguments
from pipelines.dali import Made, Request, make_views
from pipelines.draws import draw
from pipelines.graph import build_crops
from pipelines.header import read_header
from pipelines.recipes import RECIPES, ViewRecipe

_MAX_PIXELS = 100_000_000
_PREFETCH = 2


@dataclass(frozen=True)
class Batches:
    """SimCLR's requests of `size` images, which come round again, for views of `side` pixels."""

    images: list[bytes]
    size: int
    side: int

    @property
    def recipes(self) -> tuple[ViewRecipe, ...]:
        return tuple(replace(recipe, size=self.side) for recipe in RECIPES["simclr"])

    @cached_property
    def _encoded(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Bytes and sizes, which a run's readers look up in processes of their own."""
        sizes = [read_header(content, max_pixels=_MAX_PIXELS)[:2] for content in self.images]
        return [np.frombuffer(content, np.uint8) for content in self.images], np.array(sizes)

    def request(self, step: int) -> Request:
        """Step's images and draws."""
        samples = np.arange(step * self.size, (step + 1) * self.size)
        encoded, sizes = self._encoded
        rows = samples % len(encoded)
        draws = tuple(
            draw(recipe, seed=0, epoch=0, view=view, samples=samples, sizes=sizes[rows])
            for view, recipe in enumerate(self.recipes)
        )
        return Request([encoded[row] for row in rows], draws)

    def arguments(self) -> Iterator[list[Any]]:
        """What build_crops' source gives, for ever."""
        return _arguments(map(self.request, itertools.count()), self.recipes)


class _Held:
    """A source whose batches stay alive for as long as DALI, which copies nothing, may read them."""

    def __init__(self, batches: Iterator[list[Any]], kept: int) -> None:
        self._batches, self._held, self._kept = batches, [], kept

    def __call__(self) -> list[Any]:
        self._held = [*self._held[-self._kept :], next(self._batches)]
        return self._held[-1]


def decoded(batches: Batches, *, gpu: int | None, threads: int, **options: Any) -> Callable[[], object]:
    """Decodes, as pipelines.graph does, and no more; `options` are the decoder's, in the place of its own."""
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali.types import DALIImageType  # pyright: ignore[reportAttributeAccessIssue]

    options = {"jpeg_fancy_upsampling": True} | options
    source = _Held(([request.images] for request in map(batches.request, itertools.count())), _PREFETCH + 2)

    @pipeline_def
    def graph() -> Any:
        (encoded,) = fn.external_source(source=source, num_outputs=1, no_copy=True)
        device = "cpu" if gpu is None else "mixed"
        return fn.decoders.image(encoded, device=device, output_type=DALIImageType.RGB, **options)

    pipeline: Any = graph(  # pyright: ignore[reportCallIssue]
        batch_size=batches.size, num_threads=threads, device_id=gpu, prefetch_queue_depth=_PREFETCH
    )
    pipeline.build()
    return lambda: pipeline.run(_stream(gpu))


def crops(
    batches: Batches, *, gpu: int | None, threads: int, prefetch: int = _PREFETCH
) -> Callable[[], object]:
    """Decodes and crops both views."""
    pipeline = _crops(batches, batches.recipes, batches.arguments(), gpu, threads, prefetch)
    return lambda: pipeline.run(_stream(gpu))


def two_halves(batches: Batches, *, gpu: int | None, threads: int) -> Callable[[], object]:
    """Two pipelines, on streams of their own, that each decode and crop half of the images."""
    half = replace(batches, size=batches.size // 2)
    steps = (map(half.request, itertools.count(start, 2)) for start in (0, 1))
    pipelines = [
        _crops(half, half.recipes, _arguments(requests, half.recipes), gpu, max(1, threads // 2), _PREFETCH)
        for requests in steps
    ]
    return lambda: [pipeline.run(_stream(gpu)) for pipeline in pipelines]


def two_singles(batches: Batches, *, gpu: int | None, threads: int) -> Callable[[], object]:
    """Two pipelines, on streams of their own, that each decode all images and crop one view."""
    pipelines = []
    for view, recipe in enumerate(batches.recipes):
        requests = map(batches.request, itertools.count())
        single = (replace(request, draws=request.draws[view : view + 1]) for request in requests)
        arguments = _arguments(single, (recipe,))
        pipelines.append(_crops(batches, (recipe,), arguments, gpu, max(1, threads // 2), _PREFETCH))
    return lambda: [pipeline.run(_stream(gpu)) for pipeline in pipelines]


def made(batches: Batches, *, gpu: int | None, threads: int) -> Iterator[Made]:
    """Finished views, for ever."""
    requests = map(batches.request, itertools.count())
    return make_views(requests, batches.recipes, batch_size=batches.size, threads=threads, gpu=gpu)


def _arguments(requests: Iterator[Request], recipes: tuple[ViewRecipe, ...]) -> Iterator[list[Any]]:
    for request in requests:
        arguments: list[Any] = [request.images]
        for recipe, draws in zip(recipes, request.draws, strict=True):
            arguments += view_arguments(recipe, draws).values()
        yield arguments


def _crops(
    batches: Batches,
    recipes: tuple[ViewRecipe, ...],
    arguments: Iterator[list[Any]],
    gpu: int | None,
    threads: int,
    prefetch: int,
) -> Any:
    source = _Held(arguments, prefetch + 2)
    return build_crops(
        recipes, source, batch_size=batches.size, threads=threads, gpu=gpu, prefetch=prefetch
    )  # fmt: skip


def _stream(gpu: int | None) -> Any:
    return None if gpu is None else torch.cuda.current_stream(gpu)
