"""The objective that a config names, with new weights or those that it starts from."""

from collections.abc import Callable
from functools import partial

import numpy as np
from jaxtyping import Float
from torch import Tensor

from pipelines.index import Index
from training.config import TrainConfig
from training.config.objective import is_own
from training.gather import Gather
from training.initial import load_initial
from training.losses import (
    Matching,
    dcl,
    margin_triplet,
    nt_logistic,
    nt_xent,
    semi_hard_nt_logistic,
    semi_hard_triplet,
)
from training.models.encoders import build_encoder
from training.models.heads import build_classifier, build_predictor, build_projector
from training.objectives import BYOL, Objective, SimCLR, Supervised
from training.own_objective import find_own

_TEMPERED = {
    "nt-xent": nt_xent,
    "dcl": dcl,
    "nt-logistic": nt_logistic,
    "nt-logistic-semi-hard": semi_hard_nt_logistic,
}
_TRIPLETS = {"margin": margin_triplet, "margin-semi-hard": semi_hard_triplet}


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
        return find_own(config.objective, options)(encoder, gather=gather, **options)
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
