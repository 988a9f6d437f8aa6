"""A contact sheet: images, each with its views below it, as a PNG."""

import io
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from pipelines.batches import Rows
from pipelines.conversion import shown
from pipelines.dali import Request, make_views
from pipelines.feed import make_request
from pipelines.quarantine import WAY_OUT
from pipelines.recipes import ViewRecipe

# Pixels between the pictures of a sheet.
GAP = 4
_SMALLEST_SIDE = 96


def contact_sheet(
    table: pa.Table, recipes: tuple[ViewRecipe, ...], *, seed: int, epoch: int = 0, images: int = 12
) -> bytes:
    """A PNG of the first few good images of `table` (reader.SCHEMA), and below each its view of each recipe.

    Transparent between and around them. Raises ValueError where there is none.
    """

    def request(rows: Rows) -> Request:
        if not len(good := rows.good[:images]):
            raise ValueError(f"none of {len(rows)} images can be shown: {rows.first_bad}; {WAY_OUT}")
        return make_request(good, recipes, seed=seed, epoch=epoch, tag=good)

    def repair(failed: Request, broken: Mapping[int, str]) -> Request:
        return request(failed.tag.marked(broken))

    made = make_views(iter([request(Rows.of(table))]), recipes, batch_size=images, threads=1, repair=repair)
    views, good = next(made)
    size = recipes[0].size
    tiles = [
        [
            _fitted(content.data, orientation, size)
            for content, orientation in zip(good.image, good.orientation, strict=True)
        ]
    ]
    tiles += [[pixels(view, recipe) for view in batch] for batch, recipe in zip(views, recipes, strict=True)]
    return _grid(tiles, size)


def _fitted(content: memoryview, orientation: int, size: int) -> UInt8[np.ndarray, "size size 4"]:
    """The whole image, scaled into a transparent square: white bars would glare on a dark page."""
    image = shown(content, orientation).convert("RGB").convert("RGBA")
    return np.asarray(ImageOps.pad(image, (size, size), color=(0, 0, 0, 0)))


def pixels(view: Float[torch.Tensor, "3 size size"], recipe: ViewRecipe) -> UInt8[np.ndarray, "size size 3"]:
    """A normalised view as it looks."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (recipe.mean, recipe.std))
    scaled = (view * std + mean).clamp(0, 1) * 255
    return scaled.round().byte().permute(1, 2, 0).numpy()


def _grid(rows: list[list[np.ndarray]], size: int) -> bytes:
    scale = max(1, -(-_SMALLEST_SIDE // size))
    pitch = size * scale + GAP
    sheet = Image.new("RGBA", (pitch * len(rows[0]) - GAP, pitch * len(rows) - GAP))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            tile = Image.fromarray(picture).resize((size * scale, size * scale), Image.Resampling.NEAREST)
            sheet.paste(tile, (x * pitch, y * pitch))
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()
