"""The `diptych` command and the clusters it runs on."""

import lazy_loader

# The names in __init__.pyi are imported at first use: most take seconds, and Ray reads its environment at
# import.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
