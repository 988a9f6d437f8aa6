"""Fine-tuning: the config of a run with labels that starts from another run's encoder."""

from dataclasses import asdict, replace

from pipelines.config import DataConfig
from training.config import (
    EvaluationConfig,
    FinetuneConfig,
    OptimizerConfig,
    TrainConfig,
    config_hash,
)
from training.objective_config import SupervisedConfig

# With at most this share of the labels the images are seen twice as often.
_FEW = 0.02
_LARGEST_BATCH, _STEPS_PER_EPOCH = 256, 8

# What is as in the run: the network, and where and how it runs. All else is the run's own, and may have no
# effect here.
_KEPT = (
    "encoder", "seed", "lanes", "precision", "compile", "checkpoint", "workers", "cpus_per_worker",
    "gpus_per_worker", "wait_for_nodes", "retries", "timeout", "trackers",
)  # fmt: skip

# What the views keep of the run's.
_KEPT_OF_VIEWS = ("size", "crop_scale", "crop_ratio", "interpolation", "flip", "mean", "std")


def finetune_config(
    config: TrainConfig, checkpoint: str, settings: FinetuneConfig, *, share: float, images: int, classes: int
) -> TrainConfig:
    """The run that fine-tunes the encoder of `config`'s `checkpoint` on `images`, `share` of those labelled.

    Its name tells the settings apart, so that each is a run of its own, which can be resumed.
    Chen et al. 2020, appendix B.5, but for the batch size.
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
    """A multiple of lanes, and more than one image, for batch norm."""
    return max(2, max(1, min(_LARGEST_BATCH, images // _STEPS_PER_EPOCH) // lanes) * lanes)


def _data(data: DataConfig) -> DataConfig:
    """The same images, randomly cropped and flipped alone."""
    kept = {name: value for name, value in asdict(data.view).items() if name in _KEPT_OF_VIEWS}
    others = {
        name: value for name, value in asdict(data).items() if name not in ("recipe", "view", "second_view")
    }
    return DataConfig(**others, recipe="supervised", view=kept)  # pyright: ignore[reportArgumentType]
