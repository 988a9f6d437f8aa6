"""Losses: pure functions, of the global batch."""

from training.losses.nt_xent import nt_xent

__all__ = ["nt_xent"]
