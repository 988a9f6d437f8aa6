"""Draws to the arguments of DALI's operators. Pure NumPy."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from pipelines.draws import Draws, draw
from pipelines.orientation import backwards, is_sideways, turned
from pipelines.recipes import ViewRecipe


def argument_names(recipe: ViewRecipe) -> tuple[str, ...]:
    """The keys of `view_arguments`, in their order."""
    nothing = np.arange(0)
    draws = draw(recipe, seed=0, epoch=0, view=0, samples=nothing, sizes=np.ones((0, 2), np.int64))
    return tuple(view_arguments(recipe, draws, nothing))


def view_arguments(recipe: ViewRecipe, draws: Draws, orientation: Int[np.ndarray, " n"]) -> dict[str, Any]:
    """Arguments of the operators that this recipe needs, a batch of each.

    The draws are of images as they are shown, the arguments are for images as they are stored. What comes
    out must still be transposed where `transposed` says so.
    """
    start, end = _region(recipe, draws)
    start, end = (turned(place, orientation) for place in (start, end))
    ends, mirrored = turned(draws.size, orientation), backwards(orientation)
    start, end = (np.where(mirrored, ends - place, place).astype(np.float32) for place in (start, end))
    given: dict[str, Any] = {"start": start, "end": end}
    if recipe.rotate and not _right_angles(recipe):
        # A transposition after a rotation is the same as one before it, the rotation being the other way.
        angle = np.where(is_sideways(orientation), -draws.angle, draws.angle)
        given |= {"rotate": draws.rotate, "angle": angle.astype(np.float32)}
    return given


def transposed(
    recipe: ViewRecipe, draws: Draws, orientation: Int[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """The views whose rows and columns must change places once they are cropped."""
    sideways = is_sideways(orientation)
    if recipe.rotate and _right_angles(recipe):
        sideways ^= draws.rotate & (draws.angle % 180 == 90)
    return sideways


def _right_angles(recipe: ViewRecipe) -> bool:
    return recipe.rotate_degrees is None


def _region(recipe: ViewRecipe, draws: Draws) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, "n 2"]]:
    """Where a view starts and ends in its image as it is shown, rows and columns.

    A region that ends before it starts comes out mirrored. That makes a flip; it makes half a turn, where
    both are; and where rows and columns change places afterwards, it makes a quarter turn either way.
    """
    start, end = draws.box[:, :2], draws.box[:, :2] + draws.box[:, 2:]
    mirrored = np.stack([np.zeros_like(draws.flip), draws.flip], axis=1)
    if recipe.rotate and _right_angles(recipe):
        turn = np.where(draws.rotate, draws.angle, 0)
        mirrored ^= np.stack([turn >= 180, (turn == 90) | (turn == 180)], axis=1)
    return np.where(mirrored, end, start).astype(float), np.where(mirrored, start, end).astype(float)
