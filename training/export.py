"""Export of a trained encoder to formats that other programs read."""

import io
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from pipelines import storage
from training.checkpoint import Checkpoints
from training.config import TrainConfig, config_hash
from training.config.encoder import (
    EFFICIENTNETS,
    IMAGENET_DEPTHS,
    RESNETS,
    TIMM,
    TORCHVISION,
    EncoderConfig,
    depth_of,
)
from training.evaluation.finetune import encoder_of
from training.models.encoders import Encoder
from training.models.timm_models import blank_timm_model
from training.models.torchvision_models import blank_model
from training.models.weight_names import Naming, namings, shifted, timm_naming
from training.run_folder import read_config

_LOG = logging.getLogger("diptych")

# Limit of a protobuf message, which an ONNX file is.
_ONNX_BYTES = 2**31


@dataclass(frozen=True, eq=False)
class Trained:
    """An encoder in evaluation mode, after `step` steps of the run of `config`."""

    encoder: Encoder
    config: TrainConfig
    step: int

    @property
    def metadata(self) -> dict[str, str]:
        """Facts that users of the features need: the network, its run, and how to prepare images."""
        view = self.config.data.view
        encoder, default = asdict(self.config.encoder), asdict(EncoderConfig())
        chosen = {key: value for key, value in encoder.items() if key == "name" or value != default[key]}
        return {
            "encoder": json.dumps(chosen),
            "features": str(self.encoder.dim),
            "size": str(view.size),
            "mean": json.dumps(view.mean),
            "std": json.dumps(view.std),
            "config_hash": config_hash(self.config),
            "step": str(self.step),
        }


def read_trained(run: str, step: int | None = None, warn: Callable[[str], None] = _LOG.warning) -> Trained:
    """The encoder from the run's checkpoint of `step`, by default its newest complete one.

    Calls warn(message) for newer ones that are damaged. Raises ValueError if there is no such run or
    checkpoint.
    """
    run = storage.absolute(run.rstrip("/"))
    config = read_config(run)
    checkpoints = Checkpoints(run, config.checkpoint.keep)
    saved = checkpoints.latest(warn) if step is None else checkpoints.load(step)
    if saved is None:
        raise ValueError(f"{run} has no checkpoint yet; let it train to its first")
    return Trained(encoder_of(config, saved), config, saved["step"])


def torchvision_name(config: EncoderConfig) -> str:
    """torchvision's name for the same network; ValueError where it has none."""
    if config.name.startswith(TORCHVISION):
        return config.name.removeprefix(TORCHVISION)
    if config.name.startswith(TIMM):
        raise ValueError(f"{config.name} has timm's names of weights; try --format timm")
    if config.name in EFFICIENTNETS:
        return config.name.replace("-", "_")
    named = config.name in RESNETS and not config.name.startswith("plain")
    if named and depth_of(config.name) in IMAGENET_DEPTHS:
        if config.stem != "cifar" and config.width == 1:
            return config.name
        raise ValueError(
            f"torchvision's {config.name} has no width of 2 or more and no 3x3 stem; "
            "try --format safetensors or --format onnx"
        )
    raise ValueError(f"torchvision has no {config.name}; try --format safetensors or --format onnx")


def to_torchvision(trained: Trained) -> bytes:
    """A state dict for torchvision's model with 1,000 classes and a classifier of zeros, saved by torch.

    Without its classifier, that model outputs the encoder's features in evaluation mode.
    """
    model = blank_model(torchvision_name(trained.config.encoder))
    return _for_model(trained, model, next(namings(trained.encoder.trunk)))


def timm_name(config: EncoderConfig) -> str:
    """timm's name for the same network; ValueError where it has none."""
    if config.name.startswith(TIMM):
        return config.name.removeprefix(TIMM)
    if config.name.startswith(TORCHVISION):
        raise ValueError(f"{config.name} has torchvision's names of weights; try --format torchvision")
    try:
        return torchvision_name(config)
    except ValueError as error:
        raise ValueError(f"{error}".replace("torchvision", "timm", 1)) from error


def to_timm(trained: Trained) -> bytes:
    """As to_torchvision, for timm's model."""
    model = blank_timm_model(timm_name(trained.config.encoder))
    return _for_model(trained, model, timm_naming(trained.encoder.trunk))


def _for_model(trained: Trained, model: nn.Module, naming: Naming) -> bytes:
    """The weights by the names of `model`, with zeros for what the encoder lacks."""
    ours = shifted(_tensors(trained.encoder), -naming.shift)
    weights = {naming.theirs(name): tensor for name, tensor in ours.items()}
    state = {
        key: weights.get(key, torch.zeros(blank.shape, dtype=blank.dtype))
        for key, blank in model.state_dict().items()
    }
    assert weights.keys() <= state.keys(), weights.keys() - state.keys()
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def to_safetensors(trained: Trained) -> bytes:
    """The encoder's weights by name, timm's for its models, with the metadata."""
    from safetensors.torch import save

    tensors = _tensors(trained.encoder)
    if trained.config.encoder.name.startswith(TIMM):
        naming = timm_naming(trained.encoder.trunk)
        tensors = {naming.theirs(name): tensor for name, tensor in tensors.items()}
    return save(tensors, metadata=trained.metadata)


def to_onnx(trained: Trained) -> bytes:
    """The network from `images` (a batch of any size, normalised) to `features`, with the metadata.

    Raises ValueError where onnx or onnxscript is not installed, or the network is too large for one file.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--format onnx needs {error.name}; install it with: pip install onnx onnxscript"
        ) from error
    weights = sum(tensor.nbytes for tensor in _tensors(trained.encoder).values())
    if weights >= _ONNX_BYTES:
        raise ValueError(
            f"an ONNX file holds less than 2 GiB, and the encoder has {weights / 2**30:.1f}; "
            "try --format safetensors"
        )
    size = trained.config.data.view.size
    program = torch.onnx.export(
        trained.encoder,
        (torch.zeros(2, 3, size, size),),
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        node.ClearField("metadata_props")  # These hold paths of this machine.
    onnx.helper.set_model_props(model, trained.metadata)
    return model.SerializeToString()


def _tensors(encoder: Encoder) -> dict[str, Tensor]:
    """The encoder's weights, contiguous in memory."""
    return {key: value.contiguous() for key, value in encoder.trunk.state_dict().items()}


WRITERS: Mapping[str, Callable[[Trained], bytes]] = {
    "torchvision": to_torchvision,
    "timm": to_timm,
    "safetensors": to_safetensors,
    "onnx": to_onnx,
}
