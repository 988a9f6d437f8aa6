"""The networks, optimiser and moving average that a run trains and a checkpoint holds."""

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipelines.index import Index
from training.checkpoint import snapshot
from training.config import TrainConfig
from training.gather import LocalGather
from training.gradients import Backward, micro_batches, whole_batch
from training.losses import Matching
from training.models.batch_norm import synchronize_batch_norm
from training.models.exact import exact_lanes, make_exact
from training.objective_builder import build_objective
from training.objectives import Objective
from training.optimizers import build_optimizer, load_moments
from training.process import Worker
from training.step_timer import StepTimer, TimedGather

# Synchronised batch norm keeps its buffers equal by itself. The option's name changed with torch 2.15.
_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers": False
}


class TrainState:
    """One worker's copy; all workers' are equal.

    objective: the networks and the loss. optimizer: its optimiser. average: the moving average of its
    weights, if the config has one.
    """

    def __init__(
        self,
        config: TrainConfig,
        index: Index,
        worker: Worker,
        saved: dict[str, Any] | None,
        timer: StepTimer,
        matching: Matching,
    ) -> None:
        """As the checkpoint `saved` has it, if there is one. `matching` gets each step's view matching."""
        self._config, self._worker, self._timer = config, worker, timer
        self.objective = self._build(index, matching, resumed=saved is not None)
        self.optimizer = build_optimizer(self.objective, config.optimizer)
        self.average: AveragedModel | None = None
        if config.optimizer.average_decay is not None:
            moving = get_ema_multi_avg_fn(config.optimizer.average_decay)
            self.average = AveragedModel(self.objective, multi_avg_fn=moving, use_buffers=True)
        if saved:
            self.load(saved)

    def _build(self, index: Index, matching: Matching, *, resumed: bool) -> Objective:
        torch.manual_seed(self._config.seed)
        gather = TimedGather(self._worker.gather, self._timer)
        # A checkpoint has what `init` would give, which may be gone by now.
        config = replace(self._config, init=None) if resumed else self._config
        of_loss = LocalGather() if config.exact else gather
        objective = build_objective(config, index, of_loss, matching)
        objective.to(self._worker.device)
        # Convolutions are faster so, on CPUs by 1.4 times.
        objective.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if config.exact:
            make_exact(objective, exact_lanes(config, gather))
        else:
            synchronize_batch_norm(objective, gather)
        return objective

    def load(self, saved: dict[str, Any]) -> None:
        """Take the values of a checkpoint's contents."""
        self.objective.load_state_dict(saved["model"])
        load_moments(self.optimizer, saved["optimizer"])
        if self.average:
            self.average.load_state_dict(saved["average"])
        torch.set_rng_state(saved["random"])

    def snapshot(self, step: int) -> dict[str, Any]:
        """Contents of a checkpoint after `step`; tensors are shared, not copied."""
        return snapshot(step, self.objective, self.optimizer, self._config, self.average)

    def after_step(self, step: int, steps: int) -> None:
        """Update what follows the weights, after the optimiser's step number `step`, from 0, of `steps`."""
        self.objective.after_step(step, steps)
        if self.average:
            self.average.update_parameters(self.objective)

    @property
    def evaluated(self) -> Objective:
        """The objective whose encoder is evaluated: that of the moving average, if there is one."""
        averaged: Any = self.average.module if self.average else self.objective
        return averaged

    def backward(self) -> Backward:
        """How a step computes its gradients: of the whole batch or in micro-batches, on all workers."""
        config, gather = self._config, self._worker.gather
        on_gpu = self._worker.device.type == "cuda"
        half = config.precision == "bfloat16" or (config.precision == "auto" and on_gpu and not config.exact)
        dtype = torch.bfloat16 if half else torch.float32
        if config.compile:
            self.objective.encoder.compile()
        if config.exact:
            gather = LocalGather()  # Exact layers add up all workers' gradients themselves.
        if config.micro_batch_size is not None and config.micro_batch_size < config.batch_size:
            lanes = config.lanes // self._worker.gather.world_size
            parts = config.batch_size // config.micro_batch_size
            return micro_batches(
                self.objective, lanes=lanes, parts=parts, gather=gather, dtype=dtype, timer=self._timer
            )
        model = self.objective
        if gather.world_size > 1:
            model = DistributedDataParallel(model, **_NO_BUFFER_SYNC)
        return whole_batch(model, dtype=dtype, timer=self._timer)
