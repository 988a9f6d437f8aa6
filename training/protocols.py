"""How a finished run's encoder is judged on the test images: kNN or a linear probe, over all workers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from training.checkpoint import Checkpoints, weights_of
from training.config import FeatureName, ProbeConfig, TrainConfig
from training.encoders import Encoder, build_encoder
from training.evaluator import Evaluator, Sets
from training.heads import build_projector
from training.process import Worker
from training.run import run_uri


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way to judge the features of a checkpoint, frozen, with the labelled training images.

    careful: decode images in another process first, since one of them has ended a worker.
    """

    name: Literal["knn", "linear"]
    step: int
    features: FeatureName = "encoder"
    probe: ProbeConfig | None = None
    careful: bool = False

    def __call__(
        self, config: TrainConfig, sets: Sets, worker: Worker, progress: Callable[[dict[str, Any]], None]
    ) -> None:
        """Judge the run of `config`; every worker calls it, and rank 0 tells `progress` what was found."""
        encoder = load_encoder(config, self.step, self.features)
        encoder.to(worker.device)
        evaluator = Evaluator(config, sets, worker.careful if self.careful else worker)
        found: dict[str, Any] = {"protocol": self.name, "features": self.features}
        if self.name == "knn":
            found |= evaluator.knn(encoder)
        else:
            found |= evaluator.linear(encoder, self.probe or ProbeConfig())
        if worker.gather.rank == 0:
            progress({"step": self.step, **found})


def load_encoder(config: TrainConfig, step: int, features: FeatureName = "encoder") -> Encoder:
    """The encoder of the run's checkpoint of `step`, in evaluation mode; with its projector if asked.

    Raises ValueError where there is no such checkpoint, or no projector in it.
    """
    return encoder_of(config, Checkpoints(run_uri(config), config.checkpoint.keep).load(step), features)


def encoder_of(config: TrainConfig, saved: dict[str, Any], features: FeatureName = "encoder") -> Encoder:
    """The same, out of what a checkpoint holds."""
    encoder = build_encoder(config.encoder)
    encoder.load_state_dict(weights_of("encoder", saved))
    if features == "projector":
        projector = build_projector(config.projector, encoder.dim, config.objective)
        kept = weights_of("projector", saved)
        if not kept:
            raise ValueError(f"the run of {config.name} has no projector; evaluate its encoder")
        projector.load_state_dict(kept)
        encoder = Encoder(nn.Sequential(encoder, projector), projector.dim)
    return encoder.eval()
