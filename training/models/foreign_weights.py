"""Weights of torchvision, timm and other libraries' checkpoints, for an encoder to start from."""

import io
import json
import sys
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor

from pipelines import storage
from training.config.encoder import TIMM, TORCHVISION
from training.models.encoders import Encoder
from training.models.weight_names import OURS, Found, Naming, groups, namings, shifted

# So many names of a kind are listed.
_LISTED = 4


class Fit(NamedTuple):
    """Tensors for an encoder's trunk by its own names, a line that says which fit, and whether all do."""

    tensors: dict[str, Tensor]
    summary: str
    complete: bool


def read_weights(place: str, encoder: Encoder) -> Fit:
    """The weights of `place` that fit the encoder, which may be on the meta device.

    torchvision:NAME downloads the library's default weights, unless they are in torch.hub's cache. Raises
    ValueError where there are none, the file is damaged or could run code, or most of the encoder's tensors
    are not in it.
    """
    content = read_content(place)
    expected = encoder.trunk.state_dict()
    found, naming, tensors = max(
        ((found, naming, _fitting(expected, found, naming)) for found in groups(content)
         for naming in namings(encoder.trunk)),
        key=lambda candidate: len(candidate[2]), default=(Found({}, "", False), Naming(str), {}),
    )  # fmt: skip
    needed = [name for name in expected if not name.endswith("num_batches_tracked")]
    fitting = sum(name in tensors for name in needed)
    summary = f"{place}: {fitting} of the encoder's {len(needed)} tensors fit"
    lacking = _lacking(needed, expected, found, naming, tensors)
    if 2 * fitting <= len(needed):
        raise ValueError(f"{summary}{lacking}; set --encoder to the network that the weights are of")
    if not found.ours:
        tensors = shifted(tensors, naming.shift)
    used = {naming.theirs(name) for name in expected}
    unused = [name for name in found.tensors if name not in used]
    summary += f" ({found.origin}){lacking}{_listed('not used', unused)}"
    return Fit(tensors, summary, fitting == len(needed))


def read_content(place: str) -> Mapping[str, Any]:
    """The entries of a file, or torchvision's tensors, on the CPU; raises as `read_weights` does."""
    if place.startswith((TORCHVISION, TIMM)):
        return _downloaded(*place.split(":", 1))
    return _read(place)


def _fitting(expected: Mapping[str, Tensor], found: Found, naming: Naming) -> dict[str, Tensor]:
    """The tensors of the group whose name and shape are those of one that is expected, by our names."""
    theirs = {name: found.tensors.get(naming.theirs(name)) for name in expected}
    return {
        name: tensor
        for name, tensor in theirs.items()
        if tensor is not None and tensor.shape == expected[name].shape
    }


def _lacking(
    needed: list[str],
    expected: Mapping[str, Tensor],
    found: Found,
    naming: Naming,
    tensors: Mapping[str, Tensor],
) -> str:
    missing, misshapen = [], []
    for name in needed:
        if name not in tensors:
            theirs = found.tensors.get(naming.theirs(name))
            if theirs is None:
                missing.append(name)
            else:
                misshapen.append(f"{name} {_shape(theirs)}, not {_shape(expected[name])}")
    return _listed("not in the file", missing) + _listed("of another shape", misshapen)


def _listed(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"; {kind}: {', '.join(names[:_LISTED])}{more}" if names else ""


def _shape(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "scalar"


def _downloaded(library: str, name: str) -> Mapping[str, Any]:
    if f"{library}:" == TIMM:
        raise ValueError(
            "diptych downloads torchvision's weights alone; save timm's by torch.save(timm.create_model("
            f"{name!r}, pretrained=True).state_dict(), 'weights.pt'), and give --init weights.pt"
        )
    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"torchvision has no weights of {name!r}; give --init {TORCHVISION}resnet50"
        ) from error
    try:
        # A bar for who looks on; workers have no terminal.
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{weights.url} could not be downloaded: {storage.first_line(error)}; fetch it elsewhere "
            "and give the file to --init"
        ) from error


def _read(uri: str) -> Mapping[str, Any]:
    content = storage.read(uri)
    if content is None:
        raise ValueError(
            f"there is no file {uri}; give --init a run, one of its checkpoints, or a file of weights"
        )
    try:
        if uri.endswith(".safetensors"):
            return _safetensors(content)
        if content.startswith(b"PK"):  # torch checks no checksum.
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"wrong checksum of {damaged}")
        # DINO's checkpoints have the command's arguments in one.
        with torch.serialization.safe_globals([Namespace]):
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{uri} holds more than tensors and numbers, which could run code; if you trust it, save its "
            "weights alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pt')"
        ) from error
    except Exception as error:  # torch, zipfile and safetensors raise many kinds of error for damaged files.
        raise ValueError(f"{uri} is damaged: {storage.first_line(error)}; fetch it again") from error
    return loaded if isinstance(loaded, Mapping) else {}


def _safetensors(content: bytes) -> Mapping[str, Tensor]:
    """The tensors; those that diptych has exported with the prefix of its checkpoints."""
    from safetensors.torch import load

    tensors = load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    ours = "config_hash" in header.get("__metadata__", {})
    return {f"{OURS}{name}": tensor for name, tensor in tensors.items()} if ours else tensors
