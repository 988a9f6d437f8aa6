"""The linear probe against scikit-learn, on one worker and on several."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from training.config import ProbeConfig
from training.evaluation.linear_probe import Labelled, Probed, linear_probe
from training.gather import LocalGather, ProcessGroupGather

_CONFIG = ProbeConfig(epochs=20, batch_size=128, learning_rates=(0.001, 0.01, 0.1))


def _digits() -> tuple[Labelled, Labelled]:
    pixels, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    pixels = pixels.float()
    return (pixels[:1200], labels[:1200]), (pixels[1200:], labels[1200:])


def _probe(config: ProbeConfig = _CONFIG) -> Probed:
    return linear_probe(*_digits(), config, seed=0, gather=LocalGather())


@pytest.fixture(scope="module")
def alone() -> Probed:
    return _probe()


def _probe_share() -> Probed:
    """The probe of a rank that has an uneven share of the features."""
    gather = ProcessGroupGather()
    cuts = np.linspace(0, 1, gather.world_size + 1) ** 2
    shares = []
    for features, labels in _digits():
        first, last = (int(cut * len(labels)) for cut in cuts[gather.rank : gather.rank + 2])
        shares.append((features[first:last], labels[first:last]))
    return linear_probe(shares[0], shares[1], _CONFIG, seed=0, gather=gather)


def test_the_probe_reaches_logistic_regressions_accuracy(alone: Probed):
    (features, labels), (queries, answers) = _digits()
    model = make_pipeline(StandardScaler(), LogisticRegression(C=100, max_iter=5000))
    expected = model.fit(features.numpy(), labels.numpy()).score(queries.numpy(), answers.numpy())
    assert alone.top1 == pytest.approx(expected, abs=0.02)
    assert alone.held_out_top1 > 0.9


def test_labels_of_any_size_are_probed_as_their_numbers_are(alone: Probed):
    (features, labels), (queries, answers) = _digits()
    values = torch.tensor([0, 3, 4, 9, 1000, 1001, 10**6, 10**9, 10**15, 2**62])
    far = linear_probe(
        (features, values[labels]), (queries, values[answers]), _CONFIG, seed=0, gather=LocalGather()
    )
    assert far == alone


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_workers_finds_the_same(world_size: int, alone: Probed, run_ranks: Callable):
    for probed in run_ranks(_probe_share, world_size):
        assert probed.learning_rate == alone.learning_rate
        assert probed.top1 == pytest.approx(alone.top1, abs=1e-9)


def test_the_learning_rate_is_chosen_without_the_test_set(alone: Probed):
    (features, labels), (queries, answers) = _digits()
    wrong = (queries, (answers + 1) % 10)
    chosen = linear_probe((features, labels), wrong, _CONFIG, seed=0, gather=LocalGather())
    assert (chosen.learning_rate, chosen.held_out_top1) == (alone.learning_rate, alone.held_out_top1)
    assert chosen.top1 < 0.1


def test_a_learning_rate_that_is_too_low_is_not_chosen():
    assert _probe(ProbeConfig(epochs=2, learning_rates=(1e-7, 0.1))).learning_rate == 0.1
