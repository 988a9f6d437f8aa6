"""Warnings before a run that is unlikely to learn anything."""

from collections.abc import Iterator

from training.config import TrainConfig

# The shortest run that was seen to teach a network something, `diptych demo`, has 192 steps.
_TOO_FEW, _ENOUGH = 150, 1_000

# The smallest batch for which SimCLR's paper has results with LARS (Chen et al. 2020, appendix B.1).
_SMALL_BATCH = 256


def advice(config: TrainConfig, steps: int, steps_per_epoch: int) -> Iterator[str]:
    """A line for each setting that will not do for a run of `steps`, with the way out."""
    if steps < _TOO_FEW:
        epochs = -(-_ENOUGH // steps_per_epoch)
        more = f"--steps {_ENOUGH}" if config.steps else f"--epochs {epochs:,}"
        yield f"in {steps:,} steps hardly anything is learnt; try {more}, which are {_ENOUGH:,} steps or more"
    if config.optimizer.name == "lars" and config.batch_size < _SMALL_BATCH:
        yield (
            f"LARS is for batches of {_SMALL_BATCH} images and more: with batch_size={config.batch_size} it "
            "learns slowly; try --optimizer.name adamw --optimizer.learning-rate 0.003 "
            "--optimizer.scaling none"
        )
