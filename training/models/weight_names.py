"""Where checkpoints of other libraries keep an encoder's weights, and their names for them.

| written by | entry of the file | prefix | source |
|---|---|---|---|
| torchvision | none | none | the files of torchvision.models.get_model_weights |
| timm | none, `state_dict_ema`, `state_dict` | none, `module.` | timm/models/_helpers.py, `load_state_dict` |
| MoCo | `state_dict` | `module.encoder_q.` | facebookresearch/moco, main_lincls.py |
| MoCo v3 | `state_dict` | `module.base_encoder.` | facebookresearch/moco-v3, main_lincls.py |
| SimSiam | `state_dict` | `module.encoder.` | facebookresearch/simsiam, main_lincls.py |
| DINO | `teacher`, `student` | `backbone.`, `module.backbone.` | facebookresearch/dino, utils.py |
| solo-learn | `state_dict` | `backbone.`, formerly `encoder.` | vturrisi/solo-learn, main_linear.py |
| lightly | `state_dict` | `backbone.`, `teacher_backbone.` | lightly-ai/lightly, examples/pytorch_lightning |
| diptych | `average`, `model` | `module.encoder.trunk.`, `encoder.trunk.` | training/checkpoint.py |

lightly's examples wrap `nn.Sequential(*list(resnet.children())[:-1])`, which numbers the layers.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from training.models.efficientnet import NORM_EPS, EfficientNet
from training.models.timm_models import NormAct

# The prefix in diptych's own checkpoints.
OURS = "encoder.trunk."

# In the order in which they are tried: among equals, the first is taken. So a teacher comes before its
# student, and averaged weights before the others.
_ENTRIES = (
    "average", "teacher", "state_dict_ema", "state_dict", "model_state_dict", "model", "student",
)  # fmt: skip
_PREFIXES = {
    "": "plain names",
    OURS: "diptych's",
    "backbone.": "lightly's, solo-learn's or DINO's",
    "encoder_q.": "MoCo's",
    "base_encoder.": "MoCo v3's",
    "encoder.": "SimSiam's or solo-learn's",
    "teacher_backbone.": "lightly's DINO's",
    "student_backbone.": "lightly's DINO's",
}
# DistributedDataParallel and torch.compile put these in front of all names.
_WRAPPERS = re.compile(r"(module\.|_orig_mod\.)*")

_NUMBERED = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}

# timm's names for the layers of an EfficientNet's block, by torchvision's: without expansion, and with it.
_PLAIN_BLOCK = {
    "0.0": "conv_dw", "0.1": "bn1", "1.fc1": "se.conv_reduce", "1.fc2": "se.conv_expand", "2.0": "conv_pw",
    "2.1": "bn2",
}  # fmt: skip
_EXPANDED_BLOCK = {
    "0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2.fc1": "se.conv_reduce",
    "2.fc2": "se.conv_expand", "3.0": "conv_pwl", "3.1": "bn3",
}  # fmt: skip
_EFFICIENTNET_ENDS = {"0.0": "conv_stem", "0.1": "bn1", "8.0": "conv_head", "8.1": "bn2"}

# The paper's batch norms, and ours, add 1e-3 to a variance. timm's EfficientNets add 1e-5, and so do
# torchvision's up to B4; from B5 on, with its 2,048 features, they add 1e-3.
_SHIFT, _TORCHVISION_SHIFTS_BELOW = 1e-5 - NORM_EPS, 2048


class Naming(NamedTuple):
    """Another library's names for the weights of one of our networks.

    theirs: their name, given ours. shift: how much more their batch norms add to a variance than ours.
    """

    theirs: Callable[[str], str]
    shift: float = 0.0


class Found(NamedTuple):
    """A group of tensors in a file, by name, and who writes such names; ours: diptych does."""

    tensors: Mapping[str, Tensor]
    origin: str
    ours: bool


def namings(trunk: nn.Module) -> Iterator[Naming]:
    """The names that the weights of `trunk` may have, the likeliest first."""
    split = [path for path, module in trunk.named_modules() if isinstance(module, NormAct)]
    if split:
        yield timm_naming(trunk)
        yield Naming(str)
    elif isinstance(trunk, EfficientNet):
        yield Naming(str, _SHIFT if trunk.dim < _TORCHVISION_SHIFTS_BELOW else 0.0)
        yield timm_naming(trunk)
    else:
        yield Naming(str)
        yield Naming(_numbered)
        yield Naming(_old_densenet)


def timm_naming(trunk: nn.Module) -> Naming:
    """timm's names for the weights of our ResNets and EfficientNets and of its own models."""
    if isinstance(trunk, EfficientNet):
        return Naming(_timm_efficientnet, _SHIFT)
    parts = {f"{path}.norm." for path, module in trunk.named_modules() if isinstance(module, NormAct)}

    def joined(name: str) -> str:
        layer, _, last = name.rpartition(".")
        return f"{layer.removesuffix('norm')}{last}" if f"{layer}." in parts else name

    return Naming(joined)


def shifted(tensors: Mapping[str, Tensor], shift: float) -> dict[str, Tensor]:
    """The tensors with running variances raised by `shift`, for batch norms that add so much less.

    A shift below 0 may bring a variance below 0, though not by more than batch norm adds.
    """
    return {
        name: tensor + shift if shift and name.endswith("running_var") else tensor
        for name, tensor in tensors.items()
    }


def groups(content: Mapping[str, object]) -> Iterator[Found]:
    """The groups of tensors of a file that may be an encoder's weights, the likeliest first."""
    for entry in (content, *(content.get(name) for name in _ENTRIES)):
        if not isinstance(entry, Mapping):
            continue
        tensors = {
            _WRAPPERS.sub("", name, count=1): tensor
            for name, tensor in entry.items()
            if isinstance(name, str) and isinstance(tensor, Tensor)
        }
        for prefix, origin in _PREFIXES.items():
            found = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            if found:
                yield Found(found, f"{origin}, {prefix}*" if prefix else origin, prefix == OURS)


def _numbered(name: str) -> str:
    first, _, rest = name.partition(".")
    return f"{_NUMBERED.get(first, first)}.{rest}"


def _old_densenet(name: str) -> str:
    """The name in torchvision's files of DenseNets, which are older than its classes' names."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name)


def _timm_efficientnet(name: str) -> str:
    layer, _, last = name.removeprefix("features.").rpartition(".")
    if layer in _EFFICIENTNET_ENDS:
        return f"{_EFFICIENTNET_ENDS[layer]}.{last}"
    stage, block, _, place = layer.split(".", 3)
    places = _PLAIN_BLOCK if stage == "1" else _EXPANDED_BLOCK
    return f"blocks.{int(stage) - 1}.{block}.{places[place]}.{last}"
