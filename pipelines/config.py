"""What the user can set about the data."""

from collections.abc import Mapping
from dataclasses import asdict, field
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from pipelines.recipes import RECIPES, STRICT, Share, ViewRecipe


def _recipe_name(name: str) -> str:
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}; there are {', '.join(RECIPES)}")
    return name


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Which images, and how they are read and augmented."""

    train: str
    """Training images: a Parquet file, a folder of them or a pattern with *, as a path, file:// or s3://."""
    test: str | None = None
    """Labelled held-out images, for evaluation alone. When unset, nothing is evaluated."""
    image_column: str = "image"
    """Column with the encoded image: bytes, or a struct with a field `bytes`."""
    label_column: str = "label"
    """Column with the class as a whole number from 0; training without labels does not need it."""
    recipe: Annotated[str, AfterValidator(_recipe_name)] = "simclr"
    """Named recipe that `view` starts from: simclr or simclr-cifar."""
    view: ViewRecipe = field(default_factory=ViewRecipe)
    """How a view is made; fields that are not set are the recipe's."""
    evaluation_crop: Share = 0.875
    """Side of the centre square that evaluation sees, as a share of the shorter side."""
    window_rows: Annotated[int, Field(ge=1)] = 1024
    """Images of a lane that are read and shuffled together."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_recipe(cls, given: Any) -> Any:
        """Fill the view's unset fields from the named recipe."""
        values = getattr(given, "kwargs", given)
        if not isinstance(values, Mapping) or isinstance(values.get("view"), ViewRecipe):
            return given
        recipe = RECIPES.get(values.get("recipe", "simclr"), ViewRecipe())
        return {**values, "view": {**asdict(recipe), **(values.get("view") or {})}}
