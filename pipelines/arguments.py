"""Draws to the arguments of DALI's operators. Pure NumPy."""

from typing import Any

import numpy as np
from jaxtyping import Float

from pipelines.draws import Draws, draw
from pipelines.recipes import ViewRecipe


def argument_names(recipe: ViewRecipe) -> tuple[str, ...]:
    """The keys of `view_arguments`, in their order."""
    sizes = np.ones((0, 2), np.int64)
    return tuple(
        view_arguments(recipe, draw(recipe, seed=0, epoch=0, view=0, samples=np.arange(0), sizes=sizes))
    )


def view_arguments(recipe: ViewRecipe, draws: Draws) -> dict[str, Any]:
    """What the operators that this recipe needs take, a batch of each."""
    start, end = _region(recipe, draws)
    given: dict[str, Any] = {"start": start, "end": end}
    if recipe.rotate and _right_angles(recipe):
        given |= {"transpose": draws.rotate & (draws.angle % 180 == 90)}
    elif recipe.rotate:
        given |= {"rotate": draws.rotate, "angle": draws.angle.astype(np.float32)}
    return given


def _right_angles(recipe: ViewRecipe) -> bool:
    return recipe.rotate_degrees is None


def _region(recipe: ViewRecipe, draws: Draws) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, "n 2"]]:
    """Where a view starts and ends in its image, rows and columns.

    A region that ends before it starts comes out mirrored. That makes a flip; it makes half a turn, where
    both are; and where rows and columns change places afterwards, it makes a quarter turn either way.
    """
    start, end = draws.box[:, :2], draws.box[:, :2] + draws.box[:, 2:]
    mirrored = np.stack([np.zeros_like(draws.flip), draws.flip], axis=1)
    if recipe.rotate and _right_angles(recipe):
        turn = np.where(draws.rotate, draws.angle, 0)
        mirrored ^= np.stack([turn >= 180, (turn == 90) | (turn == 180)], axis=1)
    start, end = np.where(mirrored, end, start), np.where(mirrored, start, end)
    return start.astype(np.float32), end.astype(np.float32)
