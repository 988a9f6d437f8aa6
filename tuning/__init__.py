"""Hyper-parameter search over any key of a training config."""

from tuning.config import SearchConfig

__all__ = ["SearchConfig"]
