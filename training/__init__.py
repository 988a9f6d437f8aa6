"""Encoders, losses and the training loop, from one process to a Ray cluster."""
