"""Which weights `init` names: those of a run of diptych, or others."""

import re
from collections.abc import Callable

from pipelines import storage
from training.checkpoint import find_checkpoint
from training.config.encoder import TIMM, TORCHVISION

_LIBRARIES = (TORCHVISION, TIMM)
_ENDINGS = (".pt", ".pth", ".ckpt", ".tar", ".bin", ".safetensors")
_OF_A_RUN = re.compile(r"(.*/)?step-\d{9}\.pt")


def is_foreign(place: str) -> bool:
    """Whether `place` is torchvision:NAME or a file of weights, and not a run or a run's checkpoint."""
    return place.startswith(_LIBRARIES) or (place.endswith(_ENDINGS) and not _OF_A_RUN.fullmatch(place))


def find_initial(place: str, warn: Callable[[str], None]) -> str:
    """The URI of what `init` names, the same for every process: a file, or a run's checkpoint.

    torchvision:NAME stays as it is. Raises ValueError where a run has no checkpoint.
    """
    if place.startswith(_LIBRARIES):
        return place
    place = storage.absolute(place)
    return place if is_foreign(place) else find_checkpoint(place, warn)
