"""From bytes in object storage to two augmented views on the device."""

import lazy_loader

# The names in __init__.pyi are imported on first use: most take seconds, and Ray reads its environment when
# it is imported.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
