"""Everything that a run needs to go on, saved and loaded."""

import io
import logging
import math
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from pipelines import storage
from pipelines.storage.checksums import NO_COMMENT, check_whole, checked_json, json_with_checksum, seal_zip
from training.config import TrainConfig, config_hash
from training.lease import Held

_BEST = "best.json"
_NAME = re.compile(r"step-(\d{9})\.pt")
_LOG = logging.getLogger("diptych")


class DamagedError(ValueError):
    """A file that is no whole checkpoint."""

    def __init__(
        self, uri: str, reason: str, way_out: str = "restore it, or take another checkpoint"
    ) -> None:
        super().__init__(uri, reason, way_out)
        self.uri, self.reason = uri, reason

    def __str__(self) -> str:
        uri, reason, way_out = self.args
        return f"{uri} is damaged: {reason}; {way_out}"


class Checkpoints:
    """The checkpoints of one run, in RUN/checkpoints; the newest `keep` and the best are kept.

    held: the lease under which they are written, if there is one.
    """

    def __init__(self, run: str, keep: int, held: Held | None = None) -> None:
        self.run, self._folder = run, storage.join(run, "checkpoints")
        self._keep, self._held, self._told = keep, held, False
        # Names of the checkpoints that were there at first, and of those written since.
        self._own: set[str] | None = None

    def check_run(self) -> None:
        """FileNotFoundError where the run's folder on this machine has vanished, or is no longer mounted."""
        storage.check_folder(self.run)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        config: TrainConfig,
        average: AveragedModel | None = None,
    ) -> None:
        """Save whole or not at all, then delete what is no longer kept; raises as `write` does."""
        self.write(step, snapshot(step, model, optimizer, config, average))

    def write(self, step: int, saved: dict[str, Any], *, score: float | None = None) -> None:
        """Write what a snapshot holds; one with a score is the best so far, and spared until the next.

        Raises UnsavedError where another process has taken the run over.
        """
        content = io.BytesIO()
        torch.save(saved, content)
        seal_zip(content)
        if self._own is None:
            self._own = set(self._names())
        if self._held:  # Before anything is removed: it may be what another process is writing.
            self._held.check()
        with self._telling():  # They may be what fills the disk.
            storage.remove_partials(self._folder)
        storage.write(self.uri(step), content.getvalue())
        self._own.add(_name(step))
        if score is not None:
            best = json_with_checksum({"step": step, "score": score}).encode()
            storage.write(storage.join(self._folder, _BEST), best)
        # A run begins at its newest whole checkpoint: later ones that it finds are damaged, and not needed.
        # Those that come afterwards are another process's, which has taken the run over.
        names = [name for name in self._names() if name in self._own]
        done = [name for name in names if _step(name) <= step]
        spared = self.best()[0]
        kept = {*done[-self._keep :], *(name for name in done if _step(name) == spared)}
        with self._telling():
            for name in names:
                if name not in kept:
                    storage.remove(storage.join(self._folder, name))

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Where files cannot be deleted, say so once: the next save tries again."""
        try:
            yield
        except OSError as error:
            if not self._told:
                _LOG.warning("older checkpoints could not be deleted: %s", storage.first_line(error))
            self._told = True

    def best(self) -> tuple[int | None, float]:
        """Step and score of the best checkpoint; None and minus infinity where none has a score."""
        with suppress(ValueError, LookupError):  # A damaged file names none; the next best one mends it.
            if best := storage.read_as(checked_json, storage.join(self._folder, _BEST)):
                return best["step"], best["score"]
        return None, -math.inf

    def latest(self, warn: Callable[[str], None] = _LOG.warning) -> dict[str, Any] | None:
        """Contents of the newest whole checkpoint, on the CPU, or None where there is none at all.

        warn(message) hears of newer ones that are damaged; raises DamagedError where all are.
        """
        newest: DamagedError | None = None
        names = self._names()
        self._own = set(names) if self._own is None else self._own
        for name in reversed(names):
            try:
                saved = self.load(_step(name))
            except DamagedError as error:
                newest = newest or error
                continue
            if newest:
                warn(f"{newest.uri} is damaged: {newest.reason}; took step {saved['step']} instead")
            return saved
        if newest:
            way_out = f"no older one is whole; restore one, or delete {self._folder} to train from the start"
            raise DamagedError(newest.uri, newest.reason, way_out)
        return None

    def load(self, step: int) -> dict[str, Any]:
        """Contents of the checkpoint of `step`, on the CPU.

        Raises ValueError where there is none, DamagedError where it is not whole.
        """
        saved = read_checkpoint(self.uri(step))
        if saved is None:
            kept = ", ".join(str(_step(name)) for name in self._names()) or "none"
            raise ValueError(f"{self._folder} has no checkpoint of step {step}; it has {kept}")
        if saved["step"] != step:
            raise DamagedError(self.uri(step), f"it holds step {saved['step']}")
        return saved

    def uri(self, step: int) -> str:
        """Where the checkpoint of `step` is, if there is one."""
        return storage.join(self._folder, _name(step))

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, whole or not; None where there is none."""
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


def find_checkpoint(place: str, warn: Callable[[str], None] = _LOG.warning) -> str:
    """The URI of a checkpoint, given that, or its run: then its newest that is whole, as Checkpoints.latest.

    Raises ValueError where the run has none.
    """
    if place.endswith(".pt"):
        return place
    checkpoints = Checkpoints(place.rstrip("/"), keep=1)
    saved = checkpoints.latest(warn)
    if saved is None:
        raise ValueError(f"{place} has no checkpoint; give OUTPUT/NAME of a run, or one of its checkpoints")
    return checkpoints.uri(saved["step"])


def read_checkpoint(uri: str) -> dict[str, Any] | None:
    """Contents of the checkpoint at `uri`, on the CPU, or None where there is none.

    Raises DamagedError where the file is broken off or altered, or is no checkpoint of a run.
    """
    content = checkpoint_bytes(uri)
    if content is None:
        return None
    try:
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise DamagedError(
            uri, "it holds other things than tensors and numbers, which could run code"
        ) from error
    except Exception as error:  # torch raises many kinds of error for what it did not write.
        raise DamagedError(uri, storage.first_line(error)) from error
    kinds = {"step": int, "model": dict, "config": dict}
    if not isinstance(saved, dict) or not all(
        isinstance(saved.get(key), kind) for key, kind in kinds.items()
    ):
        raise DamagedError(uri, "it is no checkpoint of a run")
    return saved


def checkpoint_bytes(uri: str) -> bytes | None:
    """The bytes of the checkpoint at `uri`, None where there is none; DamagedError where it is not whole."""

    def whole(content: bytes) -> bytes:
        if reason := _fault(content):
            raise DamagedError(uri, reason)
        return content

    return storage.read_as(whole, uri)


def _fault(content: bytes) -> str | None:
    """Why the archive is not whole; torch looks at no checksum as it loads one."""
    try:
        if check_whole(content):
            return None
        # Written before diptych gave files a checksum of its own. Those of a zip do not cover its headers,
        # where torch takes a member that is marked as a folder for an empty one, and its memory as it is.
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            marked = (member.filename for member in archive.filelist if member.external_attr)
            harmed = archive.testzip() or next(marked, None)
    except Exception as error:  # zipfile raises many kinds of error for headers that are garbled.
        return storage.first_line(error)
    if harmed:
        return f"wrong checksum of {harmed}"
    return None if content.endswith(NO_COMMENT) else "it is broken off"


def weights_of(network: str, saved: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a part of the objective in a checkpoint, averaged where the run kept an average."""
    prefix = f"{network}."
    if "average" in saved:
        weights, prefix = saved["average"], f"module.{prefix}"
    else:
        weights = saved["model"]
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _name(step: int) -> str:
    return f"step-{step:09}.pt"


def _step(name: str) -> int:
    match = _NAME.fullmatch(name)
    assert match
    return int(match[1])
