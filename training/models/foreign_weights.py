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

# The share of the tensors that must fit. A ResNet-50's file fits 77 of a ResNet-18's 100.
_ENOUGH = 0.8

# The first bytes of what torch writes: a zip, and a pickle before torch 1.6.
_PICKLES = (b"PK", b"\x80")

# Layers whose weights an encoder need not have, though it may have others in them.
_HEADS = {"fc", "head", "heads", "classifier"}


class Fit(NamedTuple):
    """Tensors for an encoder's trunk by its own names, a line that says which fit, and whether all do."""

    tensors: dict[str, Tensor]
    summary: str
    complete: bool


class _Match(NamedTuple):
    """The tensors of a group in a file that fit an encoder under a naming, by our names."""

    found: Found
    naming: Naming
    tensors: dict[str, Tensor]


def read_weights(place: str, encoder: Encoder) -> Fit:
    """The weights of `place` that fit the encoder, which may be on the meta device.

    torchvision:NAME downloads the library's default weights, unless they are in torch.hub's cache. Raises
    ValueError where there are none, the file is damaged or could run code, or it is of another network.
    """
    content, expected = read_content(place), encoder.trunk.state_dict()
    match = max(
        (_match(expected, found, naming) for found in groups(content) for naming in namings(encoder.trunk)),
        key=lambda match: len(match.tensors),
        default=_Match(Found({}, "", False), Naming(str), {}),
    )
    needed = [name for name in expected if _counts(name)]
    fitting = sum(name in match.tensors for name in needed)
    unused = _unused(expected, match)
    # A deeper network of the same kind has all that is needed, and more in the same layers.
    layers = {match.naming.theirs(name).partition(".")[0] for name in needed} - _HEADS
    deeper = [name for name in unused if name.partition(".")[0] in layers]
    summary = f"{place}: {fitting} of the encoder's {len(needed)} tensors fit"
    summary += f" ({match.found.origin})" if fitting else ""
    summary += _lacking(needed, expected, match) + _listed("not used", deeper or unused)
    if fitting < _ENOUGH * (len(needed) + len(deeper)):
        raise ValueError(f"{summary}; set --encoder to the network that the weights are of")
    tensors = match.tensors if match.found.ours else shifted(match.tensors, match.naming.shift)
    return Fit(tensors, summary, fitting == len(needed) and not deeper)


def read_content(place: str) -> Mapping[str, Any]:
    """The entries of a file, or torchvision's tensors, on the CPU; raises as `read_weights` does."""
    if place.startswith((TORCHVISION, TIMM)):
        return _downloaded(*place.split(":", 1))
    return _read(place)


def _counts(name: str) -> bool:
    """Whether a tensor is one that matters; batch norms count their batches for nothing."""
    return not name.endswith("num_batches_tracked")


def _match(expected: Mapping[str, Tensor], found: Found, naming: Naming) -> _Match:
    theirs = {name: found.tensors.get(naming.theirs(name)) for name in expected}
    fitting = {
        name: tensor
        for name, tensor in theirs.items()
        if tensor is not None and tensor.shape == expected[name].shape
    }
    return _Match(found, naming, fitting)


def _unused(expected: Mapping[str, Tensor], match: _Match) -> list[str]:
    used = {match.naming.theirs(name) for name in expected}
    return [name for name in match.found.tensors if name not in used and _counts(name)]


def _lacking(needed: list[str], expected: Mapping[str, Tensor], match: _Match) -> str:
    missing, misshapen = [], []
    for name in needed:
        if name not in match.tensors:
            theirs = match.found.tensors.get(match.naming.theirs(name))
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
        known: Any = torchvision.models.get_model_weights(name)
        weights = known.DEFAULT
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"torchvision has no weights of {name!r}; try --init {TORCHVISION}resnet50"
        ) from error
    try:
        # A bar for who looks on; workers have no terminal.
        return weights.get_state_dict(
            progress=sys.stderr.isatty(), check_hash=True, map_location="cpu", weights_only=True
        )
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
    except Exception as error:  # torch, zipfile and safetensors raise many kinds of error for damaged files.
        if isinstance(error, UnpicklingError) and content.startswith(_PICKLES):
            raise ValueError(
                f"{uri} holds more than tensors and numbers, which could run code; if you trust it, save its "
                "weights alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pt')"
            ) from error
        raise ValueError(f"{uri} is damaged: {storage.first_line(error)}; fetch it again") from error
    return loaded if isinstance(loaded, Mapping) else {}


def _safetensors(content: bytes) -> Mapping[str, Tensor]:
    """The tensors; those that diptych has exported with the prefix of its checkpoints."""
    from safetensors.torch import load

    tensors = load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    ours = "config_hash" in header.get("__metadata__", {})
    return {f"{OURS}{name}": tensor for name, tensor in tensors.items()} if ours else tensors
