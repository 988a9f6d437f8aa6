"""The `diptych` command and the clusters it runs on."""

import lazy_loader

# The names in __init__.pyi are imported once they are asked for: most take seconds, and Ray reads its
# environment as it is imported.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
