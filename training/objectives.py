"""Objectives (SimCLR, BYOL, supervised, a user's own) as modules, and how a config builds one."""

import copy
import inspect
import math
import os
import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.index import Index
from pipelines.views import Views
from training.checkpoint import read_checkpoint, weights_of
from training.config import EncoderConfig, TrainConfig
from training.config.objective import Option, is_own
from training.evaluation.certainty import class_numbers
from training.gather import Gather, mean_over_workers
from training.initial import is_foreign
from training.losses import (
    Matching,
    byol_loss,
    dcl,
    margin_triplet,
    nt_logistic,
    nt_xent,
    predictions_matched,
    semi_hard_nt_logistic,
    semi_hard_triplet,
)
from training.models.encoders import Encoder, build_encoder
from training.models.heads import Head, build_classifier, build_predictor, build_projector

if TYPE_CHECKING:
    from training.models.foreign_weights import Fit

Base = TypeVar("Base")


def find_own(base: type[Base], name: str, options: Mapping[str, Option]) -> Callable[..., Base]:
    """The subclass of `base` that MODULE:CLASS names; it takes an encoder, gather= and the options.

    Raises ValueError where there is none, or it does not take the options.
    """
    attribute = name.partition(":")[2]
    found = getattr(_module(name), attribute, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(
            f"objective={name} is no class; define class {attribute}(training.{base.__name__}) there"
        )
    try:
        inspect.signature(found).bind(None, gather=None, **options)
    except TypeError as error:
        takes = ", ".join(name for name in list(inspect.signature(found).parameters)[1:] if name != "gather")
        raise ValueError(
            f"objective_options={dict(options)} do not fit {name}, which takes {takes}: {error}"
        ) from error
    return found


def source_of(name: str) -> Path | None:
    """The file or the package of MODULE:CLASS, which workers elsewhere lack; None where it is installed.

    Raises ValueError where there is no such module.
    """
    top = sys.modules[_module(name).__name__.partition(".")[0]]
    path = Path(top.__path__[0] if hasattr(top, "__path__") else top.__file__ or "").resolve()
    return None if {"site-packages", "dist-packages"} & {*path.parts} else path


def _module(name: str) -> ModuleType:
    module = name.partition(":")[0]
    if module == "__main__":
        raise ValueError(
            f"objective={name}: no worker can import __main__; move the class to a file of its own"
        )
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"objective={name}: {error}; have {module.replace('.', '/')}.py in the folder at hand, "
            "or install it"
        ) from error


# The loss of two views' projections.
ViewLoss = Callable[[Float[Tensor, "n dim"], Float[Tensor, "n dim"]], Float[Tensor, ""]]


_TEMPERED = {
    "nt-xent": nt_xent,
    "dcl": dcl,
    "nt-logistic": nt_logistic,
    "nt-logistic-semi-hard": semi_hard_nt_logistic,
}
_TRIPLETS = {"margin": margin_triplet, "margin-semi-hard": semi_hard_triplet}


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
        """What the loss is a function of, for each view: rows that depend on their own images alone.

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


def count_classes(config: TrainConfig, index: Index) -> int:
    """Classes of the training images, for objective=supervised.

    Raises ValueError where nothing says them, or where all labels that are known are one.
    """
    index.check_labels("objective=supervised", "choose --objective simclr or byol")
    found = np.empty(0) if index.labels is None else np.unique(index.labels[index.labels >= 0])
    if index.labels is not None and not len(found):
        raise ValueError(f"no image of {index.uri} has a label; choose their column by --data.label-column")
    classes = config.supervised.classes or len(index.classes) or len(index.label_values)
    if classes == 1 or len(found) == 1:
        raise ValueError(
            f"all images of {index.uri} are of one class: objective=supervised has nothing to tell apart; "
            "give images of two classes or more, or choose --objective simclr or byol"
        )
    if classes:
        return classes
    raise ValueError(f"nothing says how many classes {index.uri} has; set --supervised.classes")


def read_initial(checkpoint: str, device: str = "cpu") -> dict[str, Any]:
    """Contents of the checkpoint or file that a run's encoder starts from; ValueError if there is none."""
    if is_foreign(checkpoint):
        from training.models.foreign_weights import read_content  # Imports torchvision.

        return dict(read_content(checkpoint))
    saved = read_checkpoint(checkpoint, device)
    if saved is None:
        raise ValueError(f"there is no checkpoint {checkpoint}; give --init a run or one of its checkpoints")
    return saved


def check_initial(config: EncoderConfig, checkpoint: str) -> "Fit | None":
    """Raise ValueError unless the checkpoint is whole and its encoder's weights fit the encoder of `config`.

    Compares names and shapes: of another run's checkpoint no weights are made or copied. Returns which
    weights of another library fit.
    """
    if is_foreign(checkpoint):
        from training.models.foreign_weights import read_weights  # Imports torchvision.

        return read_weights(checkpoint, build_encoder(config))
    saved = read_initial(checkpoint, device="meta")
    try:
        with torch.device("meta"):
            encoder = build_encoder(config)
    except NotImplementedError:  # torchvision's RegNets compute their widths with tensors.
        encoder = build_encoder(config)
    if _shapes(encoder.state_dict()) != _shapes(weights_of("encoder", saved)):
        raise _misfit(saved, checkpoint)
    return None


def load_initial(encoder: Encoder, checkpoint: str) -> "Fit | None":
    """Give `encoder` the weights of the checkpoint's encoder; ValueError if they do not fit.

    Returns which of them do, for weights of other libraries; those of a run must all.
    """
    if is_foreign(checkpoint):
        from training.models.foreign_weights import read_weights  # Imports torchvision.

        fit = read_weights(checkpoint, encoder)
        encoder.trunk.load_state_dict(fit.tensors, strict=False)
        return fit
    saved = read_initial(checkpoint)
    try:
        encoder.load_state_dict(weights_of("encoder", saved))
    except RuntimeError as error:
        raise _misfit(saved, checkpoint) from error
    return None


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


def _misfit(saved: Mapping[str, Any], checkpoint: str) -> ValueError:
    theirs = saved["config"]["encoder"]["name"]
    return ValueError(
        f"the encoder of {checkpoint}, {theirs}, does not fit this run's: set the same --encoder fields"
    )


def build_objective(
    config: TrainConfig, index: Index, gather: Gather, matching: Matching | None = None
) -> Objective:
    """The objective that `config` names, for the images of `index`; weights from torch's global generator.

    `matching` gets each step's view matching where the objective is SimCLR's or BYOL's.
    """
    encoder = build_encoder(config.encoder)
    if config.init:
        load_initial(encoder, config.init)
    if is_own(config.objective):
        options = config.objective_options
        return find_own(Objective, config.objective, options)(encoder, gather=gather, **options)
    if config.objective == "supervised":
        classifier = build_classifier(encoder.dim, count_classes(config, index))
        return Supervised(
            encoder,
            classifier,
            label_smoothing=config.supervised.label_smoothing,
            gather=gather,
            label_values=index.label_values,
        )
    projector = build_projector(config.projector, encoder.dim, config.objective)
    if config.objective == "byol":
        predictor = build_predictor(config.byol, projector.dim)
        return BYOL(
            encoder,
            projector,
            predictor,
            tau_base=config.byol.tau_base,
            views_apart=config.byol.views_apart,
            gather=gather,
            matching=matching,
        )
    return SimCLR(encoder, projector, partial(_view_loss(config), gather=gather, matching=matching))


def _view_loss(config: TrainConfig) -> Callable[..., Float[Tensor, ""]]:
    name = config.simclr.loss
    if name in _TRIPLETS:
        return partial(_TRIPLETS[name], margin=config.simclr.margin)
    return partial(_TEMPERED[name], temperature=config.temperature)


def own_modules(objective: str, options: Mapping[str, Option] | None = None) -> list[Path]:
    """The file or package of MODULE:CLASS, where it is not installed; none for other objectives.

    It is looked for in the folder at hand too. Raises ValueError where it will not do, or does not take the
    options, where they are known.
    """
    if not is_own(objective):
        return []
    if (here := os.getcwd()) not in sys.path:  # As `python -m` has it.
        sys.path.insert(0, here)
    if options is not None:
        find_own(Objective, objective, options)
    source = source_of(objective)
    return [source] if source else []
