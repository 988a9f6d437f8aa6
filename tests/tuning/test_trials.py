"""A search's trials: how they are ranked, and their log."""

from pathlib import Path

from tuning.trials import Result, Trial, ranked, read_trials, write_trials


def _trial(number: int, *scores: float) -> Trial:
    results = [Result(100 * (n + 1), score, score, 7.5 * n) for n, score in enumerate(scores)]
    return Trial(number, {"temperature": 0.1 * number}, {"temperature": 0.1}, "trials/a", 5, results=results)


def test_trials_are_ranked_by_their_last_score_and_among_equals_by_their_beginning() -> None:
    trials = [_trial(3), _trial(2, 0.4), _trial(1, 0.9, 0.4), _trial(0, 0.1, 0.7), _trial(4, 0.0)]
    assert [trial.number for trial in ranked(trials)] == [0, 1, 2, 4, 3]
    assert [trial.number for trial in ranked(reversed(trials))] == [0, 1, 2, 4, 3]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    trials = [_trial(0, 0.1, 0.7), _trial(1, 0.5), _trial(2)]
    trials[2].state, trials[2].error = "failed", "no memory"
    write_trials(str(tmp_path), reversed(trials))
    assert read_trials(str(tmp_path)) == trials


def test_an_evaluation_that_is_told_again_keeps_its_time() -> None:
    trial = _trial(0, 0.1, 0.7)
    trial.add(Result(200, 0.7, 0.7, 99.0))
    trial.add(Result(300, 0.8, 0.8, 120.0))
    assert [(result.images, result.seconds) for result in trial.results] == [
        (100, 0.0), (200, 7.5), (300, 120.0),
    ]  # fmt: skip
