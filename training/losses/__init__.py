"""Losses of the global batch; those that compare its views also measure how many match."""

from training.losses.byol import byol_loss, predictions_matched
from training.losses.matching import Matching
from training.losses.nt_logistic import nt_logistic, semi_hard_nt_logistic
from training.losses.nt_xent import dcl, nt_xent
from training.losses.triplet import margin_triplet, semi_hard_triplet

__all__ = [
    "Matching",
    "byol_loss",
    "dcl",
    "margin_triplet",
    "nt_logistic",
    "nt_xent",
    "predictions_matched",
    "semi_hard_nt_logistic",
    "semi_hard_triplet",
]
