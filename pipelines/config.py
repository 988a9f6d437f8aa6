"""What the user can set about the data."""

from collections.abc import Mapping
from dataclasses import asdict, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from pipelines.recipes import RECIPES, STRICT, Share, ViewRecipe, idle_settings


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
    key_dot: Literal["first", "last"] = "first"
    """The dot of a file's name at which its key ends in a tar: first, as WebDataset has it, or last."""
    image_ending: str | None = None
    """Ending of the image to take where a tar has several under one key, as in left.jpg; unset: the one whose
    ending has no further dot."""
    recipe: Annotated[str, AfterValidator(_recipe_name)] = "simclr"
    """Named recipe of the two views: simclr, simclr-cifar, byol, supervised or evaluation."""
    view: ViewRecipe = field(default_factory=ViewRecipe)
    """How both views are made; fields that are not set are the recipe's."""
    second_view: ViewRecipe = field(default_factory=ViewRecipe)
    """How the second view is made; fields that are not set are those set in `view`, or else the recipe's."""
    evaluation_crop: Share = 0.875
    """Side of the centre square that evaluation sees, as a share of the shorter side."""
    max_pixels: Annotated[int, Field(ge=1)] = 100_000_000
    """Images with more pixels are left out: decoding them could take all memory."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Stop the run once more than this share of the training images turned out to be no good."""
    window_bytes: Annotated[int, Field(ge=1)] = 1 << 27
    """Bytes of encoded images of a lane that are read and shuffled together, 128 MiB unless set. A worker
    holds as much for each of its lanes, and some windows ahead. Where each image is read by itself, as from a
    folder, 1,024 images are enough and no more are taken."""
    window_rows: Annotated[int, Field(ge=1)] | None = None
    """Images of a lane that are read and shuffled together; unset: as many as window_bytes hold."""

    @property
    def views(self) -> tuple[ViewRecipe, ViewRecipe]:
        """How the first and the second view are made."""
        return self.view, self.second_view

    @model_validator(mode="before")
    @classmethod
    def _start_from_recipe(cls, given: Any) -> Any:
        """Fill the views' unset fields from the named recipe, the second's from `view` before that."""
        values = getattr(given, "kwargs", given)
        if not isinstance(values, Mapping):
            return given
        both, own = _fields(values.get("view")), _fields(values.get("second_view"))
        if both is None or own is None:
            return given
        first, second = RECIPES.get(str(values.get("recipe")), RECIPES["simclr"])
        filled = {**values, "view": {**asdict(first), **both}}
        try:
            ViewRecipe(**filled["view"])
        except ValidationError:
            return filled  # What is wrong in `view` is then said once, and not of the second view too.
        return {**filled, "second_view": {**asdict(second), **both, **own}}

    @model_validator(mode="after")
    def _refuse_what_has_no_effect(self) -> "DataConfig":
        if self.view.size != self.second_view.size:
            raise ValueError(
                f"view.size={self.view.size} and second_view.size={self.second_view.size}: both views go "
                "through one encoder and need one size; set the same for both"
            )
        if self.window_rows is not None and self.window_bytes != DataConfig.window_bytes:
            raise ValueError(
                f"window_bytes={self.window_bytes} has no effect beside window_rows={self.window_rows}; "
                "leave out one of them"
            )
        for name, view, other, recipe in zip(
            ("view", "second_view"), self.views, self.views[::-1], RECIPES[self.recipe], strict=True
        ):
            if idle := idle_settings(view, other, recipe):
                raise ValueError(f"{name}: {idle[0]}")
        return self


def _fields(view: Any) -> Mapping[str, Any] | None:
    """What is set of a view; None where that is no table of fields."""
    if isinstance(view, ViewRecipe):
        return asdict(view)
    if view is None:
        return {}
    return view if isinstance(view, Mapping) else None
