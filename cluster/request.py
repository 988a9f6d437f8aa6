"""What `diptych eval` lets the user set of how an encoder is judged."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipelines.recipes import STRICT, Share
from training.config import FeatureName, FinetuneConfig, Positive, ProbeConfig, ProtocolName, Workers
from training.objective_config import Count


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationRequest:
    """How the encoder of a run is judged; what is unset is as in the run."""

    protocol: ProtocolName = "knn"
    """knn: weighted nearest neighbours. linear: a linear classifier on frozen features, its learning rate
    chosen on held-out training images. finetune: the whole network trained on with labels, as a run of its
    own below RUN/finetune."""
    labels: Share = 1.0
    """Share of the training labels of each class that may be used."""
    features: FeatureName = "encoder"
    """What is judged: the encoder's features, or the projector's output."""
    test: str | None = None
    """Labelled test images; unset: the run's."""
    checkpoint: Annotated[int, Field(ge=0)] | None = None
    """Step of the checkpoint; unset: the newest."""
    workers: Workers | None = None
    """Worker processes; unset: the run's."""
    neighbours: Count | None = None
    """Neighbours that vote; unset: the run's."""
    temperature: Positive | None = None
    """A neighbour's vote weighs exp(cosine similarity / temperature); unset: the run's."""
    probe: ProbeConfig = ProbeConfig()
    finetune: FinetuneConfig = FinetuneConfig()
