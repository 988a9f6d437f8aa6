"""Everything that a run needs to go on, saved and loaded."""

import io
import re
from dataclasses import asdict
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from pipelines import storage
from training.config import TrainConfig, config_hash

_NAME = re.compile(r"step-(\d{9})\.pt")


class Checkpoints:
    """The checkpoints of one run, in RUN/checkpoints; the newest `keep` are kept."""

    def __init__(self, run: str, keep: int) -> None:
        self._folder = storage.join(run, "checkpoints")
        self._keep = keep

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        config: TrainConfig,
        average: AveragedModel | None = None,
    ) -> None:
        """Save whole or not at all, then delete what is no longer kept."""
        content = io.BytesIO()
        saved = {
            "step": step,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "config": asdict(config),
            "config_hash": config_hash(config),
            "versions": {"torch": str(torch.__version__), "torchvision": torchvision.__version__},
        }
        if average:
            saved["average"] = average.state_dict()
        torch.save(saved, content)
        storage.write(self.uri(step), content.getvalue())
        for old in self._names()[: -self._keep]:
            storage.remove(storage.join(self._folder, old))

    def latest(self) -> dict[str, Any] | None:
        """What the newest checkpoint holds, on the CPU, or None where there is none."""
        step = self.latest_step()
        return None if step is None else self.load(step)

    def load(self, step: int) -> dict[str, Any]:
        """What the checkpoint of `step` holds, on the CPU; raises ValueError where there is none."""
        saved = read_checkpoint(self.uri(step))
        if saved is None:
            kept = ", ".join(str(_step(name)) for name in self._names()) or "none"
            raise ValueError(f"{self._folder} has no checkpoint of step {step}; it has {kept}")
        return saved

    def uri(self, step: int) -> str:
        """Where the checkpoint of `step` is, if there is one."""
        return storage.join(self._folder, f"step-{step:09}.pt")

    def latest_step(self) -> int | None:
        names = self._names()
        return _step(names[-1]) if names else None

    def _names(self) -> list[str]:
        return [name for name in storage.names(self._folder) if _NAME.fullmatch(name)]


def find_checkpoint(place: str) -> str:
    """The URI of a checkpoint, given that or its run, of whose newest; ValueError where there is none."""
    if place.endswith(".pt"):
        return place
    checkpoints = Checkpoints(place.rstrip("/"), keep=1)
    step = checkpoints.latest_step()
    if step is None:
        raise ValueError(f"{place} has no checkpoint; give OUTPUT/NAME of a run, or one of its checkpoints")
    return checkpoints.uri(step)


def read_checkpoint(uri: str) -> dict[str, Any] | None:
    """What the checkpoint at `uri` holds, on the CPU, or None where there is none."""
    content = storage.read(uri)
    if content is None:
        return None
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def weights_of(network: str, saved: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a part of the objective in a checkpoint, averaged where the run kept an average."""
    prefix = f"{network}."
    if "average" in saved:
        weights, prefix = saved["average"], f"module.{prefix}"
    else:
        weights = saved["model"]
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _step(name: str) -> int:
    match = _NAME.fullmatch(name)
    assert match
    return int(match[1])
