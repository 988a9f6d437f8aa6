"""Encoders, losses and the training loop, from one process to a Ray cluster."""

import lazy_loader

# Names in __init__.pyi are imported on first use: most take seconds, and Ray reads its environment when it is
# imported.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
