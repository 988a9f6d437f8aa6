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
    """Training images: Parquet files, WebDataset tars or a folder of images (class = first folder), by path,
    pattern with *, file://, s3://, gs:// or az://."""
    test: str | None = None
    """Labelled held-out images, for evaluation alone. When unset, nothing is evaluated."""
    image_column: str = "image"
    """Parquet column with the encoded image: bytes, or a struct with a field `bytes`."""
    key_column: str = "key"
    """Column with an image's name; Parquet files need not have it."""
    label_column: str = "label"
    """Parquet column with the class as a whole number from 0; training without labels does not need it."""
    recipe: Annotated[str, AfterValidator(_recipe_name)] = "simclr"
    """Named recipe that `view` starts from: simclr or simclr-cifar."""
    view: ViewRecipe = field(default_factory=ViewRecipe)
    """How a view is made; fields that are not set are the recipe's."""
    evaluation_crop: Share = 0.875
    """Side of the centre square that evaluation sees, as a share of the shorter side."""
    max_pixels: Annotated[int, Field(ge=1)] = 100_000_000
    """Images with more pixels are left out: decoding them could take all memory."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Stop the run once more than this share of the training images turned out to be no good."""
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
