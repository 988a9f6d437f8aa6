"""Evaluation protocols: kNN, linear probe, and fine-tuning with labels."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import nn

from pipelines.config import DataConfig
from training.checkpoint import Checkpoints, weights_of
from training.config import (
    EvaluationConfig,
    FeatureName,
    FinetuneConfig,
    OptimizerConfig,
    ProbeConfig,
    TrainConfig,
    config_hash,
)
from training.config.objective import SupervisedConfig
from training.evaluation.evaluator import Evaluator, Sets
from training.models.encoders import Encoder, build_encoder
from training.models.heads import build_projector
from training.process import Worker
from training.trainer import run_uri


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Evaluates the frozen features of a checkpoint with the labelled training images.

    careful: decode images in another process first, since one of them has crashed a worker.
    """

    name: Literal["knn", "linear"]
    step: int
    features: FeatureName = "encoder"
    probe: ProbeConfig | None = None
    careful: bool = False

    def __call__(
        self, config: TrainConfig, sets: Sets, worker: Worker, progress: Callable[[dict[str, Any]], None]
    ) -> None:
        """Evaluate the run of `config`; every worker calls it, and rank 0 reports to `progress`."""
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
    """The encoder from the run's checkpoint of `step`, in evaluation mode; with its projector if asked.

    Raises ValueError where there is no such checkpoint, or no projector in it.
    """
    return encoder_of(config, Checkpoints(run_uri(config), config.checkpoint.keep).load(step), features)


def encoder_of(config: TrainConfig, saved: dict[str, Any], features: FeatureName = "encoder") -> Encoder:
    """As load_encoder, from the contents of a checkpoint."""
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


# Up to this share of the labels, fine-tuning takes twice as many epochs.
_FEW = 0.02
_LARGEST_BATCH, _STEPS_PER_EPOCH = 256, 8

# Fields taken over from the run: the network, and where and how it runs. Others may have no effect here.
_KEPT = (
    "encoder", "seed", "lanes", "precision", "compile", "checkpoint", "workers", "cpus_per_worker",
    "gpus_per_worker", "wait_for_nodes", "retries", "timeout", "trackers",
)  # fmt: skip

# Fields of the views taken over from the run.
_KEPT_OF_VIEWS = ("size", "crop_scale", "crop_ratio", "interpolation", "flip", "mean", "std")


def finetune_config(
    config: TrainConfig, checkpoint: str, settings: FinetuneConfig, *, share: float, images: int, classes: int
) -> TrainConfig:
    """Config of a run that fine-tunes the encoder of `checkpoint` on `images` images.

    `share` is their share of all labelled ones. The run's name contains a hash of its settings, so that each
    setting has its own run, which can be resumed. Chen et al. 2020, appendix B.5, except for the batch size.
    """
    tuned = TrainConfig(
        **{name: getattr(config, name) for name in _KEPT},
        data=_data(config.data),
        output=f"{config.output}/{config.name}/finetune",
        init=checkpoint,
        objective="supervised",
        supervised=SupervisedConfig(classes=classes, labels=share if share < 1 else None),
        batch_size=settings.batch_size or _batch_size(images, config.lanes),
        epochs=settings.epochs or (60 if share <= _FEW else 30),
        optimizer=OptimizerConfig(
            name="sgd",
            nesterov=True,
            learning_rate=settings.learning_rate,
            weight_decay=0.0,
            warmup_epochs=0.0,
        ),
        evaluation=EvaluationConfig(
            batch_size=config.evaluation.batch_size,
            test_images=config.evaluation.test_images,
            diagnostic_images=0,
        ),
    )
    return replace(tuned, name=f"labels-{share:g}-{config_hash(tuned)}")


def _batch_size(images: int, lanes: int) -> int:
    """A multiple of lanes, and at least two images, which batch norm needs."""
    return max(2, max(1, min(_LARGEST_BATCH, images // _STEPS_PER_EPOCH) // lanes) * lanes)


def _data(data: DataConfig) -> DataConfig:
    """The same images, with random crops and flips alone."""
    kept = {name: value for name, value in asdict(data.view).items() if name in _KEPT_OF_VIEWS}
    others = {
        name: value for name, value in asdict(data).items() if name not in ("recipe", "view", "second_view")
    }
    return DataConfig(**others, recipe="supervised", view=kept)  # pyright: ignore[reportArgumentType]
