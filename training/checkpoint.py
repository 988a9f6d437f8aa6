"""Everything that a run needs to go on, saved and loaded."""

import io
import re
from dataclasses import asdict
from typing import Any

import torch
import torchvision
from torch import nn
from torch.optim import Optimizer

from pipelines import storage
from training.config import TrainConfig, config_hash

_NAME = re.compile(r"step-(\d{9})\.pt")


class Checkpoints:
    """The checkpoints of one run, in RUN/checkpoints; the newest `keep` are kept."""

    def __init__(self, run: str, keep: int) -> None:
        self._folder = storage.join(run, "checkpoints")
        self._keep = keep

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, config: TrainConfig) -> None:
        """Save whole or not at all, then delete what is no longer kept."""
        content = io.BytesIO()
        torch.save(
            {
                "step": step,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "config": asdict(config),
                "config_hash": config_hash(config),
                "versions": {"torch": str(torch.__version__), "torchvision": torchvision.__version__},
            },
            content,
        )
        storage.write(storage.join(self._folder, f"step-{step:09}.pt"), content.getvalue())
        for old in self._names()[: -self._keep]:
            storage.remove(storage.join(self._folder, old))

    def latest(self) -> dict[str, Any] | None:
        """What the newest checkpoint holds, on the CPU, or None where there is none."""
        step = self.latest_step()
        return None if step is None else self.load(step)

    def load(self, step: int) -> dict[str, Any]:
        """What the checkpoint of `step` holds, on the CPU; raises ValueError where there is none."""
        content = storage.read(storage.join(self._folder, f"step-{step:09}.pt"))
        if content is None:
            kept = ", ".join(str(_step(name)) for name in self._names()) or "none"
            raise ValueError(f"{self._folder} has no checkpoint of step {step}; it has {kept}")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    def latest_step(self) -> int | None:
        names = self._names()
        return _step(names[-1]) if names else None

    def _names(self) -> list[str]:
        return [name for name in storage.names(self._folder) if _NAME.fullmatch(name)]


def _step(name: str) -> int:
    match = _NAME.fullmatch(name)
    assert match
    return int(match[1])
