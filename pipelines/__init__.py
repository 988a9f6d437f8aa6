"""Bytes in object storage to two augmented views on the device."""

from typing import TYPE_CHECKING

from pipelines.exports import lazily

if TYPE_CHECKING:
    from pipelines.config import RECIPES, DataConfig, ViewRecipe

__getattr__ = lazily(__name__, {"pipelines.config": ("DataConfig", "RECIPES", "ViewRecipe")})

__all__ = ["RECIPES", "DataConfig", "ViewRecipe"]
