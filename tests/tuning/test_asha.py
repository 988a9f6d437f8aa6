"""Asynchronous successive halving: which trials are promoted."""

import random

from tuning.asha import Rungs


def _run(scores: list[float], evaluations: int) -> dict[int, list[int]]:
    """One trial at a time, promotions first; which trials came to each evaluation, in order."""
    rungs = Rungs(evaluations)
    came: dict[int, list[int]] = {evaluation: [] for evaluation in range(1, evaluations + 1)}
    new = iter(range(len(scores)))
    while True:
        found = rungs.promotable()
        if found:
            rungs.promote(*found)
            start, trial = found[0], int(found[1])
        else:
            start, trial = 0, next(new, -1)
            if trial < 0:
                return came
        for evaluation in range(start + 1, evaluations + 1):
            came[evaluation].append(trial)
            if evaluation in rungs:
                rungs.record(evaluation, str(trial), scores[trial])
                break


def test_the_best_quarter_of_each_rung_is_promoted() -> None:
    generator = random.Random(0)
    scores = [generator.random() for _ in range(64)]
    came = _run(scores, 20)
    # Rungs at 1, 4 and 16. Those that were promoted early may have been overtaken since: a few more than a
    # quarter continue, and the best quarter always does.
    for rung, after in ((1, 2), (4, 5), (16, 17)):
        best = sorted(came[rung], key=lambda trial: -scores[trial])[: len(came[rung]) // 4]
        assert set(best) <= set(came[after])
        assert len(came[after]) < 2 * len(came[rung]) / 4
    assert len(came[1]) == 64


def test_none_is_promoted_before_there_are_four_to_compare() -> None:
    rungs = Rungs(8)
    for number in range(3):
        rungs.record(1, str(number), number)
        assert rungs.promotable() is None
    rungs.record(1, "3", 1.5)
    assert rungs.promotable() == (1, "2")
    rungs.promote(1, "2")
    assert rungs.promotable() is None


def test_the_highest_rung_goes_first_and_equals_as_they_came() -> None:
    rungs = Rungs(8)
    for number in range(8):
        rungs.record(1, str(number), 0.5)
    for number in (4, 5, 6, 7):
        rungs.record(4, str(number), 0.3)
    assert rungs.promotable() == (4, "4")
    rungs.promote(4, "4")
    assert rungs.promotable() == (1, "0")


def test_a_failed_trial_is_not_promoted_but_counts() -> None:
    rungs = Rungs(8)
    for number in range(4):
        rungs.record(1, str(number), number)
    rungs.remove("3")
    assert rungs.promotable() is None
    assert rungs.best() == (1, "2")


def test_a_trial_of_one_evaluation_has_no_rungs() -> None:
    assert 1 not in Rungs(1)
    assert [n for n in range(1, 65) if n in Rungs(64)] == [1, 4, 16]
