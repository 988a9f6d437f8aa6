"""Hyper-parameter search over any key of a training config."""
