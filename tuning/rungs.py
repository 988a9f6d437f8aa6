"""Which trials of asynchronous successive halving go on: each rung's best quarter. Pure."""

from collections.abc import Callable

# One trial in so many goes on from a rung to the next, which is so many times as far (Li et al. 2020).
_ETA = 4


class Rungs:
    """Scores after 1, 4, 16 ... of a trial's evaluations, and who went on from there."""

    def __init__(self, evaluations: int) -> None:
        self._scores: dict[int, dict[str, float]] = {}
        rung = 1
        while rung < evaluations:
            self._scores[rung] = {}
            rung *= _ETA
        self._gone: set[tuple[int, str]] = set()

    def __contains__(self, evaluation: int) -> bool:
        return evaluation in self._scores

    def record(self, rung: int, trial: str, score: float) -> None:
        """A trial has come to a rung."""
        self._scores[rung][trial] = score

    def go_on(self, rung: int, trial: str) -> None:
        """It leaves it, upwards."""
        self._gone.add((rung, trial))

    def drop(self, trial: str) -> None:
        """It goes on nowhere; its scores count for the others."""
        self._gone |= {(rung, trial) for rung in self._scores}

    def promotable(self) -> tuple[int, str] | None:
        """A rung and a trial there that is in its best quarter and may go on; the highest rung first.

        Li et al. 2020, algorithm 2.
        """
        return self._first(lambda count: count // _ETA)

    def best(self) -> tuple[int, str] | None:
        """The best trial that waits on the highest rung on which one does."""
        return self._first(lambda count: count)

    def _first(self, quota: Callable[[int], int]) -> tuple[int, str] | None:
        for rung, scores in reversed(self._scores.items()):
            # Of equals the first to come is the better one.
            ranked = sorted(scores, key=lambda trial: -scores[trial])[: quota(len(scores))]
            for trial in ranked:
                if (rung, trial) not in self._gone:
                    return rung, trial
        return None
