"""Bytes in object storage to two augmented views on the device."""

from typing import TYPE_CHECKING

from pipelines.exports import lazily

if TYPE_CHECKING:
    from pipelines.config import DataConfig
    from pipelines.recipes import RECIPES, ViewRecipe

__getattr__ = lazily(
    __name__, {"pipelines.config": ("DataConfig",), "pipelines.recipes": ("RECIPES", "ViewRecipe")}
)

__all__ = ["RECIPES", "DataConfig", "ViewRecipe"]
