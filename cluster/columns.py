"""What the `data` commands let the user set of how images are read."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipelines.config import DataConfig
from pipelines.recipes import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Columns:
    """Settings of DataConfig; those that are unset are its own defaults."""

    image_column: str | None = None
    """Parquet column with the encoded image; unset: image."""
    label_column: str | None = None
    """Parquet column with the class as a whole number; unset: label."""
    key_column: str | None = None
    """Parquet column with an image's name; unset: key, where there is one."""
    key_dot: Literal["first", "last"] | None = None
    """The dot of a file's name at which its key ends in a tar; unset: first, as WebDataset has it."""
    image_ending: str | None = None
    """Ending of the image to take where a tar has several under one key, as in left.jpg; unset: the one whose
    ending has no further dot."""
    max_pixels: Annotated[int, Field(ge=1)] | None = None
    """Images with more pixels are bad; unset: 100 million."""

    def data(self, uri: str) -> DataConfig:
        """How the images at `uri` are read."""
        return DataConfig(train=uri, **self.given)

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are not left to their defaults."""
        return {name: value for name, value in asdict(self).items() if value is not None}
