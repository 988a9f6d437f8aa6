"""One worker's whole run: data, model, steps, evaluations and what is kept of them. Knows no Ray."""

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipelines import storage
from pipelines.index import Index
from pipelines.plan import Plan, training_plan
from pipelines.quarantine import Quarantine
from pipelines.views import Views
from training.checkpoint import Checkpoints
from training.config import TrainConfig
from training.determinism import deterministic, kind_of_machine, kind_warnings
from training.errors import NonFiniteError, StoppedError
from training.evaluation.certainty import doubts
from training.evaluation.evaluator import Evaluator, Sets
from training.gradients import Backward
from training.lease import Held
from training.loop import fit
from training.losses import Matching
from training.metrics import LOG, Progress, RunLog
from training.models.encoders import Encoder, raw_pixels
from training.optimizers import learning_rate, peak_learning_rate
from training.process import Worker
from training.saver import Saver
from training.state import TrainState
from training.step_timer import StepTimer
from training.view_stream import ViewStream

# Steps after which the workers tell each other which images they left out.
_SETTLE_STEPS = 50

# So many saves in a row may fail before the run waits for the storage, and for which share of `timeout` it
# does at most: the other workers wait for rank 0 then.
_FAILED_SAVES, _SHARE_OF_TIMEOUT = 3, 0.5


def run_uri(config: TrainConfig) -> str:
    """OUTPUT/NAME, where the run is written."""
    return storage.join(config.output, config.name)


def make_plan(config: TrainConfig, index: Index) -> Plan:
    """The order in which this run sees the images of `index`."""
    settings = {"seed": config.seed, "lanes": config.lanes, "batch_size": config.batch_size}
    return training_plan(index, config.data, **settings)


def total_steps(config: TrainConfig, plan: Plan) -> int:
    """Steps of the whole run."""
    return config.steps if config.steps is not None else config.epochs * plan.steps_per_epoch


def train(
    config: TrainConfig,
    sets: Sets,
    worker: Worker,
    progress: Progress,
    *,
    until: int | None = None,
    careful_until: int = 0,
    held: Held | None = None,
) -> None:
    """Train from the newest checkpoint, or from the start, to the end; every worker of the run calls it.

    To the step `until`, where that comes before the end: the next call goes on from its checkpoint. Up to the
    step `careful_until` images are first decoded in another process: one of them may have ended a worker.

    Calls progress(values) about once a second on rank 0, with what metrics.jsonl gets; and, on the way to the
    first step, with the phase that is over. Raises StoppedError once it has saved because the worker shall
    stop, and UnsavedError where the storage takes no checkpoint for too long, or where another process has
    taken the lease `held`.
    """
    with deterministic(exact=config.exact, device=worker.device):
        _Run(config, sets, worker, progress, until, careful_until, held).train()


class _Run:
    def __init__(
        self,
        config: TrainConfig,
        sets: Sets,
        worker: Worker,
        progress: Progress,
        until: int | None,
        careful_until: int,
        held: Held | None,
    ) -> None:
        self.quarantine = Quarantine(run_uri(config))
        self.config, self.sets = config, sets.complete(config)
        self.worker = worker.without(self.quarantine.crashes)
        self.careful_until = careful_until
        self.timer, self.matching = StepTimer(), Matching()
        self.plan = make_plan(config, sets.train)
        self.steps = total_steps(config, self.plan)
        self.stop_step = self.steps if until is None else min(until, self.steps)
        self.checkpoints = Checkpoints(run_uri(config), config.checkpoint.keep, held)
        self.log: RunLog | None = None
        self.warnings: list[str] = []
        saved = self._newest_checkpoint()
        self.state = TrainState(config, sets.train, self.worker, saved, self.timer, self.matching)
        self.stream = ViewStream(
            config, sets.train, self.plan, self.worker, self.quarantine, careful_until=careful_until
        )
        self.patience = min(storage.patience(), _SHARE_OF_TIMEOUT * config.timeout)
        self.saver = Saver(self.checkpoints, self._warn, whole=saved["step"] if saved else None)
        self.start_step = saved["step"] if saved else 0
        if config.exact:
            kind = saved.get("kind") if saved else None
            self.warnings += kind_warnings(worker.gather, worker.device, kind)
        self.best, self.saved_at = self._best_score(), time.monotonic()
        self.progress = progress
        if self._leads:
            self.log = RunLog(run_uri(config), self.plan, self.steps, self.start_step, progress, held)

    @property
    def _leads(self) -> bool:
        return self.worker.gather.rank == 0

    def train(self) -> None:
        lanes = ", ".join(map(str, self.stream.lanes))
        LOG.info("steps %d to %d, lanes %s", self.start_step + 1, self.stop_step, lanes)
        if self.log:
            self.log.begin(self.worker.gather.world_size, resumed=self.saver.whole is not None)
            for message in self.warnings:
                self._warn(message)
        self._reached("model")
        if self.start_step < self.stop_step and self._leads and self.worker.stopping():
            raise StoppedError(self.start_step)  # There is nothing yet to be saved.
        views = self._views()
        if self.start_step == 0 and self.steps:
            self._evaluate(0, knn_top1_pixels=raw_pixels(self.config.data.view.size))
            self.stream.settle(0, self.log)
            self._reached("evaluation")
        backward = self.state.backward()
        try:
            self._fit(backward, views)
        except NonFiniteError as fault:
            self._roll_back(fault)
            try:
                self._fit(backward, self._views())
            except NonFiniteError as again:
                raise ValueError(
                    f"{again}, as in steps {fault.first} to {fault.last} before it went back to its last "
                    "checkpoint; try a lower --optimizer.learning-rate, or --optimizer.clip-norm 1"
                ) from again

    def _reached(self, phase: str) -> None:
        if self._leads:
            self.progress({"phase": phase, "workers": self.worker.gather.world_size})

    def _fit(self, backward: Backward, views: Iterator[Views]) -> None:
        peak = peak_learning_rate(self.config)
        warmup = min(self.config.optimizer.warmup_epochs * self.plan.steps_per_epoch, self.steps / 10)
        fit(
            self.state.objective,
            backward,
            self.state.optimizer,
            views,
            start_step=self.start_step,
            stop_step=self.stop_step,
            rate=lambda step: learning_rate(step, peak=peak, steps=self.steps, warmup_steps=round(warmup)),
            after_step=self._after_step,
            device=self.worker.device,
            clip_norm=self.config.optimizer.clip_norm,
            timer=self.timer,
        )

    def _roll_back(self, fault: NonFiniteError) -> None:
        """Load the last checkpoint, and resume after the steps that failed."""
        self.saver.insist(self.patience)
        self.worker.gather.total(torch.zeros(1, device=self.worker.device))  # Rank 0 has written it now.
        saved = self._newest_checkpoint()
        if saved is None:
            raise ValueError(
                f"{fault}, before the first checkpoint; try a lower --optimizer.learning-rate"
            ) from fault
        self.state.load(saved)
        self.start_step = fault.last
        if self.log:
            self.log.note(fault.last, rolled_back_to=saved["step"])

    def _views(self) -> Iterator[Views]:
        return self.stream.views(
            self.start_step, self.stop_step, self.log, partial(self._reached, "first batch")
        )

    def _newest_checkpoint(self) -> dict[str, Any] | None:
        """The newest whole checkpoint, if there is one: the one that rank 0 finds, on every worker."""
        gather = self.worker.gather
        saved = self.checkpoints.latest(self._warn) if self._leads else None
        chosen = torch.tensor([-1 if saved is None else saved["step"]], device=self.worker.device)
        step = int(gather.rows(chosen)[0])
        return saved if self._leads or step < 0 else self.checkpoints.load(step)

    def _best_score(self) -> float:
        """The best checkpoint's score, unless it comes after the step that this run begins at."""
        step, score = self.checkpoints.best()
        return score if step is not None and step <= self.start_step else -math.inf

    def _after_step(self, done: int, loss: Tensor, rate: float) -> None:
        value = loss.item()
        if math.isfinite(value):  # Of a step that was skipped nothing follows either.
            self.state.after_step(done - 1, self.steps)
        spent, matching = self.timer.take(), self.matching.take()
        if self.log:
            self.log.step(done, value, rate, spent, view_matching=matching)
        every = self.config.evaluation.every_epochs * self.plan.steps_per_epoch
        score = None
        if done == self.steps or (every and done % every == 0):
            score = self._evaluate(done)
        saves = done == self.stop_step or done % self.config.checkpoint.every_steps == 0
        if saves or done % _SETTLE_STEPS == 0:
            self.stream.settle(done, self.log)
        if self.log:
            self._save(done, self.log, due=saves, score=score)

    def _save(self, done: int, log: RunLog, *, due: bool, score: float | None) -> None:
        """Save where it is due, where the run was never better, or where it shall end."""
        stopping = self.worker.stopping() and done < self.stop_step
        minutes = self.config.checkpoint.every_minutes
        late = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
        better = score is not None and score > self.best
        if due or late or better or stopping:
            log.write()
            self.best = score if better and score is not None else self.best
            saved = self.state.snapshot(done) | {"kind": kind_of_machine(self.worker.device)}
            self.saver.save(done, saved, score=score if better else None)
            self.saved_at = time.monotonic()
        self.saver.look()
        if stopping or done == self.stop_step or self.saver.failed_saves >= _FAILED_SAVES:
            self.saver.insist(self.patience)
        if done == self.stop_step:
            log.end()
        if stopping:
            log.write()  # The storage may have been away when it was first tried.
            LOG.info("saved after step %d, and told to stop", done)
            raise StoppedError(done)

    def _warn(self, message: str) -> None:
        """Write down and show a warning; before there is a log, keep it for that."""
        if self.log:
            self.log.warn(message)
        else:
            self.warnings.append(message)

    def _warn_once(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)
            self._warn(message)

    def _evaluate(self, done: int, **others: Encoder) -> float | None:
        """Measure the encoder and `others`, by all workers together; accuracy on held-out images, if any."""
        judged = self.state.evaluated
        encoders = {"knn_top1": judged.encoder, **others}
        worker = self.worker.careful if done <= self.careful_until else self.worker
        left_out = self.stream.left_out
        evaluator = Evaluator(self.config, self.sets, worker, left_out, singly=self.config.exact)
        values = evaluator.online(encoders, last=done == self.steps, classifier=judged.full_classifier)
        if self.log and values:
            self.log.note(done, **values)
            for doubt in doubts(values):
                self._warn_once(doubt)
        return values.get("knn_top1") if self.sets.held_out else None
