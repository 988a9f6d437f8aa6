"""The weights that an encoder starts from: those of a run of diptych, or others."""

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipelines import storage
from training.checkpoint import find_checkpoint, read_checkpoint, weights_of
from training.config.encoder import TIMM, TORCHVISION, EncoderConfig
from training.models.encoders import Encoder, build_encoder
from training.models.meta import on_meta

if TYPE_CHECKING:
    from training.models.foreign_weights import Fit

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


def read_initial(checkpoint: str, device: str = "cpu") -> dict[str, Any]:
    """Contents of the checkpoint or file that a run's encoder starts from; ValueError if there is none."""
    if is_foreign(checkpoint):
        from training.models.foreign_weights import read_content  # Imports torchvision.

        return dict(read_content(checkpoint))
    saved = read_checkpoint(checkpoint, device)
    if saved is None:
        raise ValueError(f"there is no checkpoint {checkpoint}; give --init a run or one of its checkpoints")
    return saved


def check_initial(config: EncoderConfig, checkpoint: str) -> "Fit | None":
    """Raise ValueError unless the checkpoint is whole and its encoder's weights fit the encoder of `config`.

    Compares names and shapes: of another run's checkpoint no weights are made or copied. Returns which
    weights of another library fit.
    """
    encoder = on_meta(lambda: build_encoder(config))
    if is_foreign(checkpoint):
        from training.models.foreign_weights import read_weights  # Imports torchvision.

        return read_weights(checkpoint, encoder)
    saved = read_initial(checkpoint, device="meta")
    if _shapes(encoder.state_dict()) != _shapes(weights_of("encoder", saved)):
        raise _misfit(saved, checkpoint)
    return None


def load_initial(encoder: Encoder, checkpoint: str) -> "Fit | None":
    """Give `encoder` the weights of the checkpoint's encoder; ValueError if they do not fit.

    Returns which of them do, for weights of other libraries; those of a run must all.
    """
    if is_foreign(checkpoint):
        from training.models.foreign_weights import read_weights  # Imports torchvision.

        fit = read_weights(checkpoint, encoder)
        encoder.trunk.load_state_dict(fit.tensors, strict=False)
        return fit
    saved = read_initial(checkpoint)
    try:
        encoder.load_state_dict(weights_of("encoder", saved))
    except RuntimeError as error:
        raise _misfit(saved, checkpoint) from error
    return None


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


def _misfit(saved: Mapping[str, Any], checkpoint: str) -> ValueError:
    theirs = saved["config"]["encoder"]["name"]
    return ValueError(
        f"the encoder of {checkpoint}, {theirs}, does not fit this run's: set the same --encoder fields"
    )
