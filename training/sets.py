"""Which images a run trains on, which it is watched and judged by, and which those are compared with."""

from dataclasses import dataclass, replace

from pipelines.labels import labelled_part
from pipelines.sources import Index
from training.config import TrainConfig


@dataclass(frozen=True, eq=False)
class Sets:
    """The images of a run: those it trains on, those it is watched by, and those it is judged by.

    bank: of those it trains on the ones that evaluated images are compared with. diagnosed: of the bank the
    ones for diagnostics. `of` and `complete` choose both.
    """

    train: Index
    held_out: Index | None = None
    test: Index | None = None
    bank: Index | None = None
    diagnosed: Index | None = None

    @classmethod
    def of(cls, config: TrainConfig, train: Index, test: Index | None) -> "Sets":
        """The sets of `config` out of all images: of data.train, which it may split, and of data.test.

        What is held out and the samples have each class in proportion where `train` and `test` have their
        labels. A share of the labels is taken of what is left, so that a baseline with few labels is judged
        by the same images as a run on all. Raises ValueError where there are too few images.
        """
        settings, held_out = config.evaluation, None
        if settings.held_out is not None:
            train, held_out = train.split(settings.held_out, config.seed)
            held_out = held_out.sample(settings.test_images, config.seed)
        if (share := config.supervised.labels) is not None:
            train = labelled_part(train, config.data, share, seed=config.seed)
        test = test.sample(settings.test_images, config.seed) if test else None
        return cls(train, held_out, test).training_on(train, config)

    def training_on(self, train: Index, config: TrainConfig) -> "Sets":
        """The same with other training images, and samples of these."""
        bank = train.sample(config.evaluation.train_images, config.seed)
        diagnosed = bank.sample(config.evaluation.diagnostic_images, config.seed)
        return replace(self, train=train, bank=bank, diagnosed=diagnosed)

    def complete(self, config: TrainConfig) -> "Sets":
        """These, with their samples."""
        return self if self.bank and self.diagnosed else self.training_on(self.train, config)

    @property
    def samples(self) -> tuple[Index, Index]:
        """The bank, and of it the images for diagnostics."""
        return self.bank or self.train, self.diagnosed or self.bank or self.train
