"""Checkpoints: saving and loading all that a run needs to resume."""

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
    """A file is not a complete checkpoint."""

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

    held: the lease on the run's folder, checked before each write.
    """

    def __init__(self, run: str, keep: int, held: Held | None = None) -> None:
        self.run, self._folder = run, storage.join(run, "checkpoints")
        self._keep, self._held, self._warned = keep, held, False
        # Names of the checkpoints that were there at the start, and of those written since.
        self._known: set[str] | None = None

    def check_run(self) -> None:
        """Raise FileNotFoundError if the run's local folder is gone or no longer mounted."""
        storage.check_folder(self.run)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        config: TrainConfig,
        average: AveragedModel | None = None,
    ) -> None:
        """Save a complete checkpoint or none, then delete old ones; raises as `write` does."""
        self.write(step, snapshot(step, model, optimizer, config, average))

    def write(self, step: int, saved: dict[str, Any], *, score: float | None = None) -> None:
        """Write a snapshot. One with a score is the best so far, and is kept until the next with a score.

        Raises UnsavedError where another process has taken over the run.
        """
        content = io.BytesIO()
        torch.save(saved, content)
        seal_zip(content)
        if self._known is None:
            self._known = set(self._names())
        if self._held:  # Before anything is removed: it may be what another process is writing.
            self._held.check()
        with self._warn_once():  # Partial files may be what fills the disk.
            storage.remove_partials(self._folder)
        storage.write(self.uri(step), content.getvalue())
        self._known.add(_name(step))
        if score is not None:
            best = json_with_checksum({"step": step, "score": score}).encode()
            storage.write(storage.join(self._folder, _BEST), best)
        # A run starts from its newest complete checkpoint, so later ones that it found are damaged: they are
        # deleted. Unknown ones come from another process that has taken over the run: they stay.
        names = [name for name in self._names() if name in self._known]
        done = [name for name in names if _step(name) <= step]
        best_step = self.best()[0]
        kept = {*done[-self._keep :], *(name for name in done if _step(name) == best_step)}
        with self._warn_once():
            for name in names:
                if name not in kept:
                    storage.remove(storage.join(self._folder, name))

    @contextmanager
    def _warn_once(self) -> Iterator[None]:
        """Warn once where files cannot be deleted; the next save tries again."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                _LOG.warning("older checkpoints could not be deleted: %s", storage.first_line(error))
            self._warned = True

    def best(self) -> tuple[int | None, float]:
        """Step and score of the best checkpoint; None and minus infinity where none has a score."""
        with suppress(ValueError, LookupError):  # The next best checkpoint replaces a damaged file.
            if best := storage.read_as(checked_json, storage.join(self._folder, _BEST)):
                return best["step"], best["score"]
        return None, -math.inf

    def latest(self, warn: Callable[[str], None] = _LOG.warning) -> dict[str, Any] | None:
        """Contents of the newest complete checkpoint, on the CPU; None where there are no checkpoints.

        Calls warn(message) for newer ones that are damaged. Raises DamagedError if all are.
        """
        newest: DamagedError | None = None
        names = self._names()
        self._known = set(names) if self._known is None else self._known
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
            way_out = f"no older one is complete; restore one, or delete {self._folder} to start over"
            raise DamagedError(newest.uri, newest.reason, way_out)
        return None

    def load(self, step: int) -> dict[str, Any]:
        """Contents of the checkpoint of `step`, on the CPU.

        Raises ValueError where there is none, DamagedError where it is damaged.
        """
        saved = read_checkpoint(self.uri(step))
        if saved is None:
            kept = ", ".join(str(_step(name)) for name in self._names()) or "none"
            raise ValueError(f"{self._folder} has no checkpoint of step {step}; it has {kept}")
        if saved["step"] != step:
            raise DamagedError(self.uri(step), f"it holds step {saved['step']}")
        return saved

    def uri(self, step: int) -> str:
        """URI of the checkpoint of `step`, which need not exist."""
        return storage.join(self._folder, _name(step))

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, damaged or not; None where there is none."""
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
    """All that a run needs to resume after `step`; tensors are shared with the model, not copied."""
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
    """URI of a checkpoint, given itself or its run, whose newest complete one Checkpoints.latest finds.

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

    Raises DamagedError where the file is cut off or altered, or is not a checkpoint of a run.
    """
    content = checkpoint_bytes(uri)
    if content is None:
        return None
    try:
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise DamagedError(uri, "it holds more than tensors and numbers, which could run code") from error
    except Exception as error:  # torch raises many kinds of error for files that it did not write.
        raise DamagedError(uri, storage.first_line(error)) from error
    kinds = {"step": int, "model": dict, "config": dict}
    if not isinstance(saved, dict) or not all(
        isinstance(saved.get(key), kind) for key, kind in kinds.items()
    ):
        raise DamagedError(uri, "it is not a checkpoint of a run")
    return saved


def checkpoint_bytes(uri: str) -> bytes | None:
    """Bytes of the checkpoint at `uri`; None where there is none, DamagedError where it is damaged."""

    def checked(content: bytes) -> bytes:
        if reason := _fault(content):
            raise DamagedError(uri, reason)
        return content

    return storage.read_as(checked, uri)


def _fault(content: bytes) -> str | None:
    """Why the archive is damaged, or None; torch itself checks no checksum."""
    try:
        if check_whole(content):
            return None
        # Older files have only the zip's checksums, which do not cover its headers. Where those mark a member
        # as a folder, torch reads it as empty and returns uninitialised memory.
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            flagged = (member.filename for member in archive.filelist if member.external_attr)
            damaged = archive.testzip() or next(flagged, None)
    except Exception as error:  # zipfile raises many kinds of error for damaged headers.
        return storage.first_line(error)
    if damaged:
        return f"wrong checksum of {damaged}"
    return None if content.endswith(NO_COMMENT) else "it is cut off"


def weights_of(network: str, saved: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of one network of the objective in a checkpoint; their average where the run kept one."""
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
