"""The graph of DALI operators that turns encoded images and their draws into views.

DALI draws nothing itself: every choice comes in as an argument, so a view is the same on any device.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float
from nvidia.dali import fn, math, pipeline_def
from nvidia.dali.types import Constant, DALIDataType, DALIImageType  # pyright: ignore[reportAttributeAccessIssue]

from pipelines.arguments import argument_names
from pipelines.recipes import ViewRecipe

# From this size of a view on, three filters over planes are faster than a matrix over pixels on a CPU. There
# the resize also rounds to whole grey levels, as PIL and torchvision do.
_PLANAR_FROM = 64

# Its weights' sizes sum to one, so that a gradient stays on the scale of the view.
_SOBEL = np.array([[1, 2, 1], [0, 0, 0], [-1, -2, -1]], np.float32) / 8


def build_views(
    recipes: tuple[ViewRecipe, ...],
    source: Callable[[], list[Any]],
    *,
    batch_size: int,
    threads: int,
    gpu: int | None,
    prefetch: int,
) -> Any:
    """A pipeline of one output (n, size, size, 3) per recipe.

    Each call of `source` gives a batch of encoded images, then view_arguments of each recipe in their order.
    """
    pipeline = _views(
        recipes,
        [argument_names(recipe) for recipe in recipes],
        source,
        gpu is not None,
        batch_size=batch_size,
        num_threads=threads,
        device_id=gpu,
        prefetch_queue_depth=prefetch,
    )
    pipeline.build()
    return pipeline


def build_decoder(*, gpu: int | None) -> Any:
    """A pipeline that decodes one image at a time, its input `image`, as the views' pipeline would."""
    pipeline = _decoder(gpu is not None, batch_size=1, num_threads=1, device_id=gpu, prefetch_queue_depth=1)
    pipeline.build()
    return pipeline


@pipeline_def(enable_conditionals=True)
def _views(recipes: tuple[ViewRecipe, ...], names: list[tuple[str, ...]], source: Any, gpu: bool) -> Any:
    inputs = list(fn.external_source(source=source, num_outputs=1 + sum(map(len, names)), no_copy=True))
    images = _decoded(inputs.pop(0), gpu)
    views = []
    for recipe, wanted in zip(recipes, names):  # noqa: B905 - DALI's compiler knows no strict=
        given, inputs = dict(zip(wanted, inputs)), inputs[len(wanted) :]  # noqa: B905
        views.append(_view(images, recipe, gpu, given))
    return tuple(views)


@pipeline_def
def _decoder(gpu: bool) -> Any:
    return _decoded(fn.external_source(name="image"), gpu)


def _decoded(encoded: Any, gpu: bool) -> Any:
    return fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=DALIImageType.RGB)


def _view(images: Any, recipe: ViewRecipe, gpu: bool, given: dict[str, Any]) -> Any:
    """One view, height x width x channels. `given`: view_arguments."""
    planar = not gpu and recipe.size >= _PLANAR_FROM and "rotate" not in given
    # Crop, resize and flip in one step. Where the region is scaled down, the filter also reads the pixels
    # just outside it, which a crop followed by a resize would not.
    view: Any = fn.resize(
        images,
        size=[recipe.size, recipe.size],
        roi_start=given["start"],
        roi_end=given["end"],
        antialias=True,
        dtype=DALIDataType.UINT8 if planar else DALIDataType.FLOAT,
    )
    if "transpose" in given:
        view = _where(given["transpose"], _transposed, view)
    if "rotate" in given:
        view = _where(given["rotate"], _rotated, view, given["angle"])
    if planar:
        view = _planes(view)
    if "colour" in given and planar:
        view = _where(given["colour"], _coloured_planes, view, given["pixel"], given["mean"], recipe.size)
    elif "colour" in given:
        view = _where(given["colour"], _coloured, view, given["pixel"], given["mean"], gpu)
    if "blur" in given:
        view = _where(given["blur"], _blurred, view, given["kernel"], gpu)
    if "solarise" in given:
        view = _where(given["solarise"], _solarised, view, 255 * recipe.solarise_threshold)
    if "sobel" in given:
        view = _where(given["sobel"], _edges, view, gpu)
    view = _normalised(view, recipe)
    if "hole_start" in given:
        view = fn.erase(view, anchor=given["hole_start"], shape=given["hole_shape"], axis_names="HW")
    return view


def _where(wanted: Any, change: Callable[..., Any], view: Any, *arguments: Any) -> Any:
    """The views, changed where it is wanted; nothing is computed for the others."""
    if wanted:  # noqa: SIM108 - DALI's compiler knows no conditional expressions.
        result = change(view, *arguments)
    else:
        result = view
    return result


def _transposed(view: Any) -> Any:
    return fn.transpose(view, perm=[1, 0, 2], transpose_layout=False)


def _rotated(view: Any, angle: Any) -> Any:
    return fn.rotate(view, angle=angle, keep_size=True, fill_value=0.0)


def _coloured(view: Any, pixel: Any, mean: Any, gpu: bool) -> Any:
    shift = fn.coord_transform(fn.reductions.mean(view, axes=[0, 1], keep_dims=True), M=mean)
    if gpu:  # An argument such as T has to lie in the CPU's memory.
        moved = fn.coord_transform(view, M=pixel) + shift
    else:
        moved = fn.coord_transform(view, M=pixel, T=fn.reshape(shift, shape=[3]))
    # On the CPU math.clamp takes more than twice as long.
    return math.min(math.max(moved, 0.0), 255.0)


def _planes(view: Any) -> Any:
    """Channels x height x width, in float32."""
    return fn.crop_mirror_normalize(view, mean=[0.0], std=[1.0], output_layout="CHW")


def _coloured_planes(planes: Any, pixel: Any, mean: Any, size: int) -> Any:
    """As _coloured. A filter over the channels, one for each new channel, is a row of the matrix."""
    rows = fn.reshape(planes, shape=[3, size * size], layout="HW")
    shift: Any = fn.coord_transform(fn.reshape(fn.reductions.mean(rows, axes=[1]), shape=[1, 3]), M=mean)
    changed = []
    for channel in range(3):
        taps = fn.reshape(pixel[channel], shape=[3, 1])
        moved = fn.filter(rows, taps, mode="valid") + shift[0, channel]
        changed.append(math.min(math.max(moved, 0.0), 255.0))
    return fn.reshape(fn.cat(*changed, axis=0), shape=[3, size, size], layout="CHW")


def _blurred(view: Any, kernel: Any, gpu: bool) -> Any:
    taps = kernel.gpu() if gpu else kernel
    return fn.filter(fn.filter(view, taps), fn.transpose(taps, perm=[1, 0]))


def _solarised(view: Any, threshold: float) -> Any:
    bright = fn.cast(view >= threshold, dtype=DALIDataType.FLOAT)
    return view + bright * (255.0 - 2.0 * view)


def _edges(view: Any, gpu: bool) -> Any:
    down, right = _filtered(view, _SOBEL, gpu), _filtered(view, _SOBEL.T, gpu)
    return math.sqrt(down * down + right * right)


def _filtered(view: Any, kernel: Float[np.ndarray, "rows columns"], gpu: bool) -> Any:
    constant: Any = Constant(np.ascontiguousarray(kernel), device="gpu" if gpu else "cpu")
    return fn.filter(view, constant)


def _normalised(view: Any, recipe: ViewRecipe) -> Any:
    mean, std = ([255 * value for value in values] for values in (recipe.mean, recipe.std))
    return fn.crop_mirror_normalize(view, mean=mean, std=std, output_layout="HWC")
