"""The graph of DALI operators that turns encoded images and their draws into cropped views.

DALI draws nothing itself: every random choice is an argument, so a view is the same on any device.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from nvidia.dali import fn, pipeline_def
from nvidia.dali.types import (  # pyright: ignore[reportAttributeAccessIssue]
    DALIDataType,
    DALIImageType,
    DALIInterpType,
)

from pipelines.augment.draws import Draws, draw
from pipelines.config import ViewRecipe
from pipelines.images.orientation import backwards, is_sideways, turned

# Prefix of the modules that DALI generates from the graph's code, each in a file of the temporary folder.
_CONVERTED = "__autograph_generated_file"

# DALI's cubic is Keys' with a = -0.5, like PIL's and TensorFlow's.
_INTERPOLATIONS = {"bilinear": DALIInterpType.INTERP_LINEAR, "bicubic": DALIInterpType.INTERP_CUBIC}


def build_crops(
    recipes: tuple[ViewRecipe, ...],
    source: Callable[[], list[Any]],
    *,
    batch_size: int,
    threads: int,
    gpu: int | None,
    prefetch: int,
) -> Any:
    """A pipeline with one output (n, size, size, 3), uint8, per recipe, then the images' sizes (n, 2).

    Each call of `source` returns a batch: the encoded images, their stored heights and widths, then the
    view_arguments of each recipe, in order. An image that decodes to another size is not cropped.
    """
    pipeline = _crops(
        recipes,
        [argument_names(recipe) for recipe in recipes],
        source,
        gpu is not None,
        batch_size=batch_size,
        num_threads=threads,
        device_id=gpu,
        prefetch_queue_depth=prefetch,
    )
    _build(pipeline)
    return pipeline


def build_decoder(*, gpu: int | None) -> Any:
    """A pipeline that decodes one image at a time (input `image`), exactly as build_crops' pipeline does."""
    pipeline = _decoder(gpu is not None, batch_size=1, num_threads=1, device_id=gpu, prefetch_queue_depth=1)
    _build(pipeline)
    return pipeline


def _build(pipeline: Any) -> None:
    """Build the pipeline, and delete the files of code that DALI generated from this module.

    DALI deletes them only when the process exits, which Ray's workers never do: they are killed.
    """
    pipeline.build()
    for name, module in list(sys.modules.items()):
        if name.startswith(_CONVERTED) and module.__file__:
            Path(module.__file__).unlink(missing_ok=True)


@pipeline_def(enable_conditionals=True)
def _crops(recipes: tuple[ViewRecipe, ...], names: list[tuple[str, ...]], source: Any, gpu: bool) -> Any:
    inputs = list(fn.external_source(source=source, num_outputs=2 + sum(map(len, names)), no_copy=True))
    images, expected = _decoded(inputs.pop(0), gpu), inputs.pop(0)
    size = images.shape()[:2]
    views = []
    for recipe, wanted in zip(recipes, names):  # noqa: B905 - DALI's compiler knows no strict=
        given, inputs = dict(zip(wanted, inputs)), inputs[len(wanted) :]  # noqa: B905
        views.append(_cropped(images, recipe, _within(given, size, expected)))
    return (*views, size)


@pipeline_def
def _decoder(gpu: bool) -> Any:
    return _decoded(fn.external_source(name="image"), gpu)


def _decoded(encoded: Any, gpu: bool) -> Any:
    return fn.decoders.image(
        encoded,
        device="mixed" if gpu else "cpu",
        output_type=DALIImageType.RGB,
        # pipelines.images.orientation reads the orientation; the crop applies it.
        adjust_orientation=False,
        # Otherwise a GPU repeats a JPEG's subsampled colours, which a CPU interpolates: they would differ by
        # dozens of grey levels.
        jpeg_fancy_upsampling=True,
    )


def _within(given: dict[str, Any], size: Any, expected: Any) -> dict[str, Any]:
    """The arguments of a crop; a side whose length is not the expected one is taken whole.

    DALI would read foreign memory if a crop reached outside the image.
    """
    same = size == expected
    return {**given, "start": given["start"] * same, "end": given["end"] * same + size * (same == 0)}


def _cropped(images: Any, recipe: ViewRecipe, given: dict[str, Any]) -> Any:
    """Crop, resize and flip in one step, then rotate. `given`: view_arguments.

    When it scales a region down, the filter also reads the pixels just outside it; a crop followed by a
    resize would not. The result is rounded to whole grey levels, like PIL's and torchvision's.
    """
    view: Any = fn.resize(
        images,
        size=[recipe.size, recipe.size],
        roi_start=given["start"],
        roi_end=given["end"],
        interp_type=_INTERPOLATIONS[recipe.interpolation],
        antialias=True,
        dtype=DALIDataType.UINT8,
    )
    if "rotate" in given:
        view = _where(given["rotate"], _rotated, view, given["angle"])
    return view


def _where(wanted: Any, change: Callable[..., Any], view: Any, *arguments: Any) -> Any:
    """Apply `change` to the views that `wanted` selects; the others cost nothing."""
    if wanted:  # noqa: SIM108 - DALI's compiler knows no conditional expressions.
        result = change(view, *arguments)
    else:
        result = view
    return result


def _rotated(view: Any, angle: Any) -> Any:
    return fn.rotate(view, angle=angle, keep_size=True, fill_value=0.0)


def argument_names(recipe: ViewRecipe) -> tuple[str, ...]:
    """The keys of `view_arguments`, in order."""
    nothing = np.arange(0)
    draws = draw(recipe, seed=0, epoch=0, view=0, samples=nothing, sizes=np.ones((0, 2), np.int64))
    return tuple(view_arguments(recipe, draws, nothing))


def view_arguments(recipe: ViewRecipe, draws: Draws, orientation: Int[np.ndarray, " n"]) -> dict[str, Any]:
    """The arguments of the operators that this recipe needs, a batch of each.

    The draws refer to images as shown, the arguments to images as stored. The output must still be transposed
    where `transposed` says so.
    """
    start, end = _region(recipe, draws)
    start, end = (turned(place, orientation) for place in (start, end))
    ends, mirrored = turned(draws.size, orientation), backwards(orientation)
    start, end = (np.where(mirrored, ends - place, place).astype(np.float32) for place in (start, end))
    given: dict[str, Any] = {"start": start, "end": end}
    if recipe.rotate and not _right_angles(recipe):
        # Rotating, then transposing equals transposing, then rotating the other way.
        angle = np.where(is_sideways(orientation), -draws.angle, draws.angle)
        given |= {"rotate": draws.rotate, "angle": angle.astype(np.float32)}
    return given


def transposed(
    recipe: ViewRecipe, draws: Draws, orientation: Int[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Which views must be transposed after the crop."""
    sideways = is_sideways(orientation)
    if recipe.rotate and _right_angles(recipe):
        sideways ^= draws.rotate & (draws.angle % 180 == 90)
    return sideways


def _right_angles(recipe: ViewRecipe) -> bool:
    return recipe.rotate_degrees is None


def _region(recipe: ViewRecipe, draws: Draws) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, "n 2"]]:
    """The start and end of a view in its image as shown: (row, column) each.

    DALI mirrors an axis whose end is before its start. Mirrored columns are a flip, mirrored rows and columns
    a half turn; mirroring, then transposing, is a quarter turn.
    """
    start, end = draws.box[:, :2], draws.box[:, :2] + draws.box[:, 2:]
    mirrored = np.stack([np.zeros_like(draws.flip), draws.flip], axis=1)
    if recipe.rotate and _right_angles(recipe):
        turn = np.where(draws.rotate, draws.angle, 0)
        mirrored ^= np.stack([turn >= 180, (turn == 90) | (turn == 180)], axis=1)
    return np.where(mirrored, end, start).astype(float), np.where(mirrored, start, end).astype(float)
