from .config import RECIPES, DataConfig, ViewRecipe

__all__ = [
    "RECIPES",
    "DataConfig",
    "ViewRecipe",
]
