"""Asynchronous successive halving (ASHA) under Ray Tune: decide which trials continue."""

from collections.abc import Callable
from typing import Any

from ray.tune.schedulers import FIFOScheduler

from tuning.searcher import EVALUATIONS, FINISHED, SCORE, TrialSlots

# One in four trials is promoted from a rung to the next, which is four times as far (Li et al. 2020).
_ETA = 4


class Rungs:
    """Scores of the trials on each rung (1, 4, 16 ... evaluations), and which trials were promoted. Pure."""

    def __init__(self, evaluations: int) -> None:
        self._scores: dict[int, dict[str, float]] = {}
        rung = 1
        while rung < evaluations:
            self._scores[rung] = {}
            rung *= _ETA
        self._left: set[tuple[int, str]] = set()

    def __contains__(self, evaluation: int) -> bool:
        return evaluation in self._scores

    def record(self, rung: int, trial: str, score: float) -> None:
        """Record the score of a trial that reached a rung."""
        self._scores[rung][trial] = score

    def promote(self, rung: int, trial: str) -> None:
        """Promote a trial from a rung to the next."""
        self._left.add((rung, trial))

    def remove(self, trial: str) -> None:
        """Exclude a trial from promotion; its scores still count."""
        self._left |= {(rung, trial) for rung in self._scores}

    def promotable(self) -> tuple[int, str] | None:
        """The highest rung with a trial in its best quarter to promote, and that trial; None without one.

        Li et al. 2020, algorithm 2.
        """
        return self._first(lambda count: count // _ETA)

    def best(self) -> tuple[int, str] | None:
        """The best paused trial on the highest rung that has one."""
        return self._first(lambda count: count)

    def _first(self, quota: Callable[[int], int]) -> tuple[int, str] | None:
        for rung, scores in reversed(self._scores.items()):
            # Among equal scores, the earlier trial ranks higher.
            ranked = sorted(scores, key=lambda trial: -scores[trial])[: quota(len(scores))]
            for trial in ranked:
                if (rung, trial) not in self._left:
                    return rung, trial
        return None


class ASHA(FIFOScheduler):
    """Pauses a trial on each rung until it is among the best quarter there (Li et al. 2020, algorithm 2).

    Ray's own scheduler of that name never pauses: the first trials have nothing to be compared with and train
    to the end. When no new trial is left to start and none has finished, the best trial on the highest rung
    continues; the others are stopped.
    """

    def __init__(self, evaluations: int, slots: TrialSlots) -> None:
        super().__init__()
        self._rungs, self._slots = Rungs(evaluations), slots
        self._promoted: set[str] = set()
        self._one_has_finished = False

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide whether the trial continues or pauses after an evaluation."""
        rung = result[EVALUATIONS]
        if rung not in self._rungs:
            return self.CONTINUE
        self._rungs.record(rung, trial.trial_id, result[SCORE])
        if self._rungs.promotable() == (rung, trial.trial_id):
            self._rungs.promote(rung, trial.trial_id)
            return self.CONTINUE
        self._slots.pause(trial.trial_id)
        self._promote_all()
        return self.PAUSE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Record the last score, and exclude the trial from promotion."""
        if result.get(EVALUATIONS, 0) in self._rungs:
            self._rungs.record(result[EVALUATIONS], trial.trial_id, result[SCORE])
        self._rungs.remove(trial.trial_id)
        self._one_has_finished |= result.get(FINISHED, False)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Exclude the trial from promotion."""
        self._rungs.remove(trial.trial_id)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """The next promoted trial, or None; Tune starts new trials itself."""
        self._promote_all()
        if self._slots.all_started and not self._slots.running:
            self._promote_best_or_stop(tune_controller)
        for trial in tune_controller.get_trials():
            if trial.trial_id in self._promoted and trial.status == trial.PAUSED:
                self._promoted.remove(trial.trial_id)
                return trial
        return None

    def _promote_all(self) -> None:
        while self._slots.free and (found := self._rungs.promotable()):
            self._promote(*found)

    def _promote(self, rung: int, trial_id: str) -> None:
        self._rungs.promote(rung, trial_id)
        self._slots.occupy(trial_id)
        self._promoted.add(trial_id)

    def _promote_best_or_stop(self, controller: Any) -> None:
        found = None if self._one_has_finished else self._rungs.best()
        if found:
            self._promote(*found)
            return
        for trial in controller.get_trials():
            if trial.status == trial.PAUSED:
                controller.stop_trial(trial)
