"""Asynchronous successive halving under Ray Tune, whose trials wait until they are among the best."""

from typing import Any

from ray.tune.schedulers import FIFOScheduler

from tuning.room import EVALUATIONS, FINISHED, SCORE, Room
from tuning.rungs import Rungs


class ASHA(FIFOScheduler):
    """Li et al. 2020, algorithm 2: a trial waits on each rung until it is in the best quarter of those there.

    Ray's own scheduler of that name never lets a trial wait: those that come first have none to be compared
    with, and go on to the end. When no trial is left to begin and none has come to its end, the best of those
    that have come farthest go on; the others are stopped.
    """

    def __init__(self, evaluations: int, room: Room) -> None:
        super().__init__()
        self._rungs, self._room = Rungs(evaluations), room
        self._chosen: set[str] = set()
        self._one_has_finished = False

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        rung = result[EVALUATIONS]
        if rung not in self._rungs:
            return self.CONTINUE
        self._rungs.record(rung, trial.trial_id, result[SCORE])
        if self._rungs.promotable() == (rung, trial.trial_id):
            self._rungs.go_on(rung, trial.trial_id)
            return self.CONTINUE
        self._room.wait(trial.trial_id)
        self._promote()
        return self.PAUSE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if result.get(EVALUATIONS, 0) in self._rungs:
            self._rungs.record(result[EVALUATIONS], trial.trial_id, result[SCORE])
        self._rungs.drop(trial.trial_id)
        self._one_has_finished |= result.get(FINISHED, False)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._rungs.drop(trial.trial_id)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        self._promote()
        if self._room.all_begun and not self._room.running:
            self._end(tune_controller)
        for trial in tune_controller.get_trials():
            if trial.trial_id in self._chosen and trial.status == trial.PAUSED:
                self._chosen.remove(trial.trial_id)
                return trial
        return None  # Those that are new begin by themselves.

    def _promote(self) -> None:
        while self._room.free and (found := self._rungs.promotable()):
            self._go_on(*found)

    def _go_on(self, rung: int, trial_id: str) -> None:
        self._rungs.go_on(rung, trial_id)
        self._room.run(trial_id)
        self._chosen.add(trial_id)

    def _end(self, controller: Any) -> None:
        found = None if self._one_has_finished else self._rungs.best()
        if found:
            self._go_on(*found)
            return
        for trial in controller.get_trials():
            if trial.status == trial.PAUSED:
                controller.stop_trial(trial)
