"""Make normalised views from encoded images and their draws, on the CPU or the GPU.

DALI decodes, crops and resizes; pipelines.augment.finisher does the rest. Nothing is drawn here.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from pipelines.augment.dali_graph import build_crops, transposed, view_arguments
from pipelines.augment.draws import Draws
from pipelines.augment.finisher import Finisher
from pipelines.config import ViewRecipe
from pipelines.images.decoding import undecodable
from pipelines.images.orientation import UPRIGHT, turned

# Batches that DALI prepares ahead of the current one.
_PREFETCH = 2


@dataclass(frozen=True, eq=False)
class Request:
    """One batch to make views of: the encoded bytes of each image, and the draws of each view.

    Without `orientation` all images are upright. `tag` is returned with the views.
    """

    images: Sequence[UInt8[np.ndarray, " bytes"]]
    draws: tuple[Draws, ...]
    orientation: Int[np.ndarray, " n"] | None = None
    tag: Any = None

    @property
    def orientations(self) -> Int[np.ndarray, " n"]:
        return np.full(len(self.images), UPRIGHT) if self.orientation is None else self.orientation

    @property
    def stored_sizes(self) -> Int[np.ndarray, "n 2"]:
        """Heights and widths that the images must decode to."""
        return turned(self.draws[0].size, self.orientations).astype(np.int64)


Made = tuple[tuple[Float[Tensor, "n 3 size size"], ...], Any]

# Takes a request and the reason why an image cannot be decoded, by position; returns a request without them.
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
    """Yield (one view per recipe, tag) for each request, in order; a request has at most batch_size images.

    Views are channels last in memory. If images of a request cannot be decoded, `repair` returns a request to
    use instead, until all of its images decode; that request may be empty. Without `repair`, raises
    RuntimeError.
    """
    settings = _Settings(recipes, batch_size, threads, gpu)
    with Finisher(recipes, threads, gpu) as finisher:
        maker = _Maker(requests, settings, finisher, _PREFETCH)
        repairer = _Repairer(settings, finisher, repair) if repair else None
        while True:
            try:
                made = maker.next()
            except _RequestError as failure:
                if repairer is None:
                    raise failure.reason from None
                made = repairer.make(failure)
            if made is None:
                return
            yield made


@dataclass(frozen=True)
class _Settings:
    recipes: tuple[ViewRecipe, ...]
    batch_size: int
    threads: int
    gpu: int | None


class _RequestError(Exception):
    """DALI failed on a request: which, and why."""

    def __init__(self, request: Request, reason: RuntimeError) -> None:
        super().__init__(str(reason))
        self.request, self.reason = request, reason


class _Source:
    """Gives DALI its inputs, and holds the requests in progress, oldest first."""

    def __init__(self, requests: Iterator[Request], recipes: tuple[ViewRecipe, ...]) -> None:
        self._requests, self._recipes = requests, recipes
        # DALI does not copy its inputs, so they are held until their views are returned.
        self._held: deque[tuple[Request, list[Any]]] = deque()
        self.error: Exception | None = None

    def __call__(self) -> list[Any]:
        try:
            request = next(self._requests)
        except StopIteration:
            raise
        except Exception as error:
            # Raised after the views of the earlier requests, and not mistaken for an error of DALI's.
            self.error = error
            raise StopIteration from None
        arguments: list[Any] = [request.images, request.stored_sizes]
        for recipe, draws in zip(self._recipes, request.draws, strict=True):
            arguments += view_arguments(recipe, draws, request.orientations).values()
        self._held.append((request, arguments))
        return arguments

    def release(self) -> Request:
        """Remove and return the oldest request, which DALI has finished."""
        return self._held.popleft()[0]


class _Maker:
    """A DALI pipeline that makes the views of requests, in order."""

    def __init__(
        self, requests: Iterator[Request], settings: _Settings, finisher: Finisher, prefetch: int
    ) -> None:
        self._source, self._gpu = _Source(requests, settings.recipes), settings.gpu
        self._recipes, self._finisher = settings.recipes, finisher
        self._pipeline = build_crops(
            settings.recipes,
            self._source,
            batch_size=settings.batch_size,
            threads=settings.threads,
            gpu=settings.gpu,
            prefetch=prefetch,
        )

    def next(self) -> Made | None:
        """The oldest request's views, or None after the last. May be called again after _RequestError."""
        try:
            # On torch's stream, so that memory is reused only after torch has finished with it.
            stream = None if self._gpu is None else torch.cuda.current_stream(self._gpu)
            *outputs, sizes = self._pipeline.run(stream)
        except StopIteration:
            if self._source.error:
                raise self._source.error from None
            return None
        except RuntimeError as error:
            # An error is raised in its own request's turn, however far ahead the pipeline is.
            raise _RequestError(self._source.release(), error) from None
        # No copies: DALI keeps a batch's memory while a tensor refers to it.
        crops = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        request = self._source.release()
        if (sizes.as_array() != request.stored_sizes).any():
            raise _RequestError(
                request, RuntimeError("an image decodes to another size than its header says")
            )
        for recipe, draws, crop in zip(self._recipes, request.draws, crops, strict=True):
            _transpose(crop, np.flatnonzero(transposed(recipe, draws, request.orientations)))
        return self._finisher.finish(crops, request.draws), request.tag


class _Repairer:
    """Makes failed requests again without their broken images; builds its pipeline on first use."""

    def __init__(self, settings: _Settings, finisher: Finisher, repair: Repair) -> None:
        self._settings, self._finisher, self._repair = settings, finisher, repair
        self._waiting: deque[Request] = deque()

    def make(self, failure: _RequestError) -> Made:
        """The views of the repaired request. Raises RuntimeError if its images are not the cause."""
        while True:
            request = failure.request
            reasons = undecodable(request.images, request.stored_sizes, gpu=self._settings.gpu)
            if not reasons:
                raise failure.reason
            repaired = self._repair(request, reasons)
            if not len(repaired.images):
                return no_views(self._settings.recipes, self._settings.gpu), repaired.tag
            self._waiting.append(repaired)
            try:
                made = self._maker.next()
            except _RequestError as again:
                failure = again
                continue
            assert made
            return made

    @cached_property
    def _maker(self) -> _Maker:
        return _Maker(iter(self._waiting.popleft, None), self._settings, self._finisher, prefetch=1)


def no_views(recipes: tuple[ViewRecipe, ...], gpu: int | None) -> tuple[Float[Tensor, "0 3 size size"], ...]:
    """The views of an empty batch."""
    device = "cpu" if gpu is None else f"cuda:{gpu}"
    return tuple(torch.empty(0, 3, recipe.size, recipe.size, device=device) for recipe in recipes)


def _transpose(crops: UInt8[Tensor, "n size size 3"], rows: Int[np.ndarray, " k"]) -> None:
    """Transpose some of the crops in place."""
    if len(rows):
        chosen = torch.from_numpy(rows).to(crops.device)
        crops[chosen] = crops[chosen].transpose(1, 2)
