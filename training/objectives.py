"""Objectives (SimCLR, BYOL, supervised) as modules, and the base class of a user's own."""

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.views import Views
from training.evaluation.certainty import class_numbers
from training.gather import Gather, mean_over_workers
from training.losses import (
    Matching,
    byol_loss,
    predictions_matched,
)
from training.models.encoders import Encoder
from training.models.heads import Head

# The loss of two views' projections.
ViewLoss = Callable[[Float[Tensor, "n dim"], Float[Tensor, "n dim"]], Float[Tensor, ""]]


class Objective(nn.Module):
    """Trains `encoder`; forward is the loss of a step's views over all workers, the same on each.

    Its gradients are such that DistributedDataParallel's mean over workers is that loss's gradient.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, views: Views) -> Float[Tensor, ""]:
        return self.loss(self.embed(views), views)

    @abstractmethod
    def embed(self, views: Views) -> list[Float[Tensor, "n dim"]]:
        """The loss's arguments, for each view: rows that depend on their own images alone.

        But for batch norm. Views that go through the networks in one forward are normalised by the same
        batch statistics, and apart each by its own.
        """

    @abstractmethod
    def loss(self, embedded: list[Float[Tensor, "n dim"]], views: Views) -> Float[Tensor, ""]:
        """The loss of a step's embeddings."""

    def after_step(self, step: int, steps: int) -> None:
        """Called after the optimiser's step number `step`, from 0, of `steps`, unless that was skipped."""

    @property
    def full_classifier(self) -> Encoder | None:
        """Images to logits, where the objective trains a classifier."""
        return None


class SimCLR(Objective):
    """Agreement between projections of two views against all others. Chen et al. 2020."""

    def __init__(self, encoder: Encoder, projector: nn.Module, loss: ViewLoss) -> None:
        super().__init__(encoder)
        self.projector = projector
        self._loss = loss

    def embed(self, views: Views) -> list[Float[Tensor, "n dim"]]:
        return list(self.projector(self.encoder(torch.cat(views.images))).chunk(2))

    def loss(self, embedded: list[Float[Tensor, "n dim"]], views: Views) -> Float[Tensor, ""]:
        first, second = embedded
        return self._loss(first, second)


class BYOL(Objective):
    """Predicts from one view what a moving average of the networks makes of the other.

    Grill et al. 2020. The average starts as a copy; its batch norms use the batch's statistics too.
    """

    def __init__(
        self,
        encoder: Encoder,
        projector: Head,
        predictor: nn.Module,
        *,
        tau_base: float,
        views_apart: bool,
        gather: Gather,
        matching: Matching | None = None,
    ) -> None:
        """`matching` gets each step's view matching."""
        super().__init__(encoder)
        self.projector = projector
        self.predictor = predictor
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(projector).requires_grad_(False)
        self._tau_base, self._views_apart = tau_base, views_apart
        self._gather, self._matching = gather, matching

    def embed(self, views: Views) -> list[Float[Tensor, "n dim"]]:
        """Both views' predictions, then what the average makes of them."""
        batches = views.images if self._views_apart else [torch.cat(views.images)]
        predictions = [self.predictor(self.projector(self.encoder(images))) for images in batches]
        with torch.no_grad():
            targets = [self.target_projector(self.target_encoder(images)) for images in batches]
        return [*torch.cat(predictions).chunk(2), *torch.cat(targets).chunk(2)]

    def loss(self, embedded: list[Float[Tensor, "n dim"]], views: Views) -> Float[Tensor, ""]:
        """The mean of both directions' distances, summed; in [0, 8]."""
        *both, first, second = embedded
        predictions = torch.cat(both)
        if self._matching is not None:
            targets = torch.cat([first, second])
            self._matching.share = predictions_matched(predictions, targets, gather=self._gather)
        # Each view's prediction is held against the target of the other.
        targets = torch.cat([second, first]).detach()
        return 2 * byol_loss(predictions, targets, gather=self._gather)

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        """Move the target towards the networks that were just updated."""
        online = [*self.encoder.parameters(), *self.projector.parameters()]
        target = [*self.target_encoder.parameters(), *self.target_projector.parameters()]
        moved = 1 - target_decay(step, steps, base=self._tau_base)
        for average, weight in zip(target, online, strict=True):
            average.lerp_(weight, moved)


def target_decay(step: int, steps: int, *, base: float) -> float:
    """How much of itself BYOL's target keeps after step `step`, from 0, of `steps`: from `base` up to 1.

    Grill et al. 2020, section 3.2.
    """
    return 1 - (1 - base) * (math.cos(math.pi * step / steps) + 1) / 2


class Supervised(Objective):
    """Cross entropy with the labels, of each view that there is."""

    def __init__(
        self,
        encoder: Encoder,
        classifier: nn.Linear,
        *,
        label_smoothing: float,
        gather: Gather,
        label_values: Sequence[int] = (),
    ) -> None:
        """`label_values` are the labels of the classes, ascending; unset: 0, 1, ..."""
        super().__init__(encoder)
        self.classifier = classifier
        self.label_values: Tensor
        self.register_buffer("label_values", torch.tensor(label_values, dtype=torch.int64), persistent=False)
        self._label_smoothing, self._gather = label_smoothing, gather

    def embed(self, views: Views) -> list[Float[Tensor, "n dim"]]:
        """The logits; raises ValueError where an image has no label, or one beyond the classes."""
        self._check(views, self._numbers(views))
        logits = self.classifier(self.encoder(torch.cat(views.images)))
        return list(logits.chunk(len(views.images)))

    def loss(self, embedded: list[Float[Tensor, "n dim"]], views: Views) -> Float[Tensor, ""]:
        logits = torch.cat(embedded)
        labels = self._numbers(views).to(logits.device).repeat(len(views.images))
        loss = F.cross_entropy(logits, labels, label_smoothing=self._label_smoothing)
        return mean_over_workers(loss, self._gather)

    @property
    def full_classifier(self) -> Encoder:
        return Encoder(nn.Sequential(self.encoder, self.classifier), self.classifier.out_features)

    def _numbers(self, views: Views) -> Int[Tensor, " n"]:
        """The class of each image."""
        return class_numbers(views.labels, self.label_values.to(views.labels.device))

    def _check(self, views: Views, numbers: Int[Tensor, " n"]) -> None:
        classes = self.classifier.out_features
        wrong = (numbers < 0) | (numbers >= classes)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            counted = len(self.label_values)
            known = f"of the {counted} that were counted" if counted else f"from 0 to {classes - 1}"
            raise ValueError(
                f"image {views.samples[first]} has label {int(views.labels[first])}, not one {known}; "
                "objective=supervised needs labels of all images, or --supervised.classes"
            )
