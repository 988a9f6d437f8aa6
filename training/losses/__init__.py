"""Losses: pure functions, of the global batch."""

from training.losses.byol import byol_loss
from training.losses.nt_logistic import nt_logistic, semi_hard_nt_logistic
from training.losses.nt_xent import dcl, nt_xent
from training.losses.triplet import margin_triplet, semi_hard_triplet

__all__ = [
    "byol_loss",
    "dcl",
    "margin_triplet",
    "nt_logistic",
    "nt_xent",
    "semi_hard_nt_logistic",
    "semi_hard_triplet",
]
