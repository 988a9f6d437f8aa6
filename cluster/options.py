"""Options that the `data` and `eval` commands share with their Python functions."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipelines.config import STRICT, DataConfig, Share
from training.config import FeatureName, FinetuneConfig, Positive, ProbeConfig, ProtocolName, Workers
from training.config.objective import Count


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Columns:
    """Settings of `DataConfig`; unset ones take its defaults."""

    image_column: str | None = None
    """Parquet column with the encoded image; unset: image."""
    label_column: str | None = None
    """Parquet column with the class as an integer; unset: label."""
    key_column: str | None = None
    """Parquet column with the image's name; unset: key, if there is one."""
    key_dot: Literal["first", "last"] | None = None
    """The dot in a file's name at which its key ends in a tar; unset: first, as in WebDataset."""
    image_ending: str | None = None
    """Ending of the image to take if a tar has several under one key, such as left.jpg; unset: the one whose
    ending has no further dot."""
    max_pixels: Annotated[int, Field(ge=1)] | None = None
    """Images with more pixels are bad; unset: 100 million."""

    def data(self, uri: str) -> DataConfig:
        """The config that reads the images at `uri`."""
        return DataConfig(train=uri, **self.given)

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationRequest:
    """How to evaluate a run's encoder; unset fields are the run's."""

    protocol: ProtocolName = "knn"
    """knn: weighted nearest neighbours. linear: a linear classifier on frozen features, its learning rate
    chosen on held-out training images. finetune: train the whole network with labels, as a run of its own
    below RUN/finetune."""
    labels: Share = 1.0
    """Share of each class's training labels to use."""
    features: FeatureName = "encoder"
    """Features to evaluate: the encoder's, or the projector's output."""
    test: str | None = None
    """Labelled test images; unset: the run's."""
    checkpoint: Annotated[int, Field(ge=0)] | None = None
    """Step of the checkpoint; unset: the newest."""
    workers: Workers | None = None
    """Worker processes; unset: the run's."""
    neighbours: Count | None = None
    """Neighbours that vote; unset: the run's."""
    temperature: Positive | None = None
    """A neighbour's vote has the weight exp(cosine similarity / temperature); unset: the run's."""
    probe: ProbeConfig = ProbeConfig()
    finetune: FinetuneConfig = FinetuneConfig()
