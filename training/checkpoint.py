"""Everything that a run needs to go on, saved and loaded."""

import io
import json
import math
import re
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from pipelines import storage
from training.config import TrainConfig, config_hash

_BEST = "best.json"
_NAME = re.compile(r"step-(\d{9})\.pt")


class Checkpoints:
    """The checkpoints of one run, in RUN/checkpoints; the newest `keep` and the best are kept."""

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
        self.write(step, snapshot(step, model, optimizer, config, average))

    def write(self, step: int, saved: dict[str, Any], *, score: float | None = None) -> None:
        """Write what a snapshot holds; one with a score is the best so far, and spared until the next."""
        content = io.BytesIO()
        torch.save(saved, content)
        storage.write(self.uri(step), content.getvalue())
        if score is not None:
            best = json.dumps({"step": step, "score": score}).encode()
            storage.write(storage.join(self._folder, _BEST), best)
        spared = self.best()[0]
        for old in self._names()[: -self._keep]:
            if _step(old) != spared:
                storage.remove(storage.join(self._folder, old))

    def best(self) -> tuple[int | None, float]:
        """Step and score of the best checkpoint; None and minus infinity where none has a score."""
        content = storage.read(storage.join(self._folder, _BEST))
        best = json.loads(content) if content else {"step": None, "score": -math.inf}
        return best["step"], best["score"]

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


def snapshot(
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    config: TrainConfig,
    average: AveragedModel | None = None,
) -> dict[str, Any]:
    """All that a run needs to go on after `step`; tensors are the model's own, not copies."""
    saved = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "config": asdict(config),
        "config_hash": config_hash(config),
        "versions": {"torch": str(torch.__version__), "torchvision": version("torchvision")},
    }
    return saved | {"average": average.state_dict()} if average else saved


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
