"""kNN against scikit-learn's on its digits; features as the encoder gives them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn import functional as F

from pipelines.views import Views
from training.config import EncoderConfig, EvaluationConfig
from training.evaluation.knn import embed, fitting_neighbours, knn_accuracy, knn_votes
from training.gather import LocalGather, ProcessGroupGather
from training.models.encoders import build_encoder, raw_pixels

_BANK = 1100

Labelled = tuple[Tensor, Tensor]


def _digits() -> tuple[Labelled, Labelled]:
    """1,100 digits to vote and 697 to classify; the features are the pixels."""
    pixels, labels = load_digits(return_X_y=True)
    features, labels = torch.tensor(pixels), torch.tensor(labels)
    return (features[:_BANK], labels[:_BANK]), (features[_BANK:], labels[_BANK:])


def _sklearn(bank: Labelled, neighbours: int, temperature: float) -> KNeighborsClassifier:
    def votes(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / temperature)

    weights: Any = votes
    classifier = KNeighborsClassifier(neighbours, metric="cosine", weights=weights)
    return classifier.fit(bank[0].numpy(), bank[1].numpy())


@pytest.mark.parametrize(("neighbours", "temperature"), [(1, 0.1), (20, 0.1), (200, 0.07), (200, 1.0)])
def test_votes_and_accuracy_are_scikit_learns(neighbours: int, temperature: float) -> None:
    bank, queries = _digits()
    classifier = _sklearn(bank, neighbours, temperature)
    votes = knn_votes(
        F.normalize(queries[0]),
        F.normalize(bank[0]),
        bank[1],
        classes=10,
        neighbours=neighbours,
        temperature=temperature,
    )
    expected = classifier.predict_proba(queries[0].numpy())
    np.testing.assert_allclose(votes / votes.sum(1, keepdim=True), expected, rtol=1e-9, atol=1e-12)
    config = EvaluationConfig(neighbours=neighbours, temperature=temperature)
    expected_accuracy = classifier.score(queries[0].numpy(), queries[1].numpy())
    assert knn_accuracy(bank, queries, config, LocalGather()) == pytest.approx(expected_accuracy, abs=1e-6)


def test_where_there_are_fewer_images_than_neighbours_all_of_them_vote() -> None:
    bank, queries = _digits()
    expected = _sklearn(bank, _BANK, 0.1).score(queries[0].numpy(), queries[1].numpy())
    config = EvaluationConfig(neighbours=10 * _BANK, temperature=0.1)
    assert knn_accuracy(bank, queries, config, LocalGather()) == pytest.approx(expected, abs=1e-6)


def test_as_many_neighbours_vote_as_the_smallest_class_can_outvote() -> None:
    sizes = [(5000, 5000), (732, 1300), (100, 100), (38, 60, 74), (3, 900), (60, 900), (3, 3)]
    banks = [torch.repeat_interleave(torch.arange(len(each)), torch.tensor(each)) for each in sizes]
    assert [fitting_neighbours(None, labels) for labels in banks] == [200, 200, 33, 12, 200, 20, 1]
    assert [fitting_neighbours(50, labels) for labels in banks] == [50, 50, 50, 50, 50, 50, 6]
    assert fitting_neighbours(10**6, banks[2]) == 200


def test_a_small_bank_is_classified_better_than_by_its_largest_class_alone() -> None:
    """172 digits of three kinds: 200 neighbours are all of them, and all say the largest class."""
    pixels, labels = load_digits(return_X_y=True)
    rows = np.concatenate(
        [np.flatnonzero(labels == label)[:count] for label, count in enumerate((76, 58, 38))]
    )
    others = np.setdiff1d(np.flatnonzero(labels < 3), rows)
    bank, queries = ((torch.tensor(pixels[which]), torch.tensor(labels[which])) for which in (rows, others))
    largest = (queries[1] == 0).double().mean().item()
    config = EvaluationConfig(temperature=1e6)
    assert knn_accuracy(bank, queries, replace(config, neighbours=200), LocalGather()) == pytest.approx(
        largest
    )
    assert knn_accuracy(bank, queries, config, LocalGather()) > 0.95


def test_labels_of_any_size_are_voted_for_as_their_numbers_are() -> None:
    (bank, labels), (queries, answers) = _digits()
    values = torch.tensor([0, 3, 4, 9, 1000, 1001, 10**6, 10**9, 10**15, 2**62])
    config = EvaluationConfig(neighbours=20)
    expected = knn_accuracy((bank, labels), (queries, answers), config, LocalGather())
    far = (bank, values[labels]), (queries, values[answers])
    assert knn_accuracy(*far, config, LocalGather()) == expected
    # A class that the bank lacks is never voted for.
    assert knn_accuracy(far[0], (queries, values[answers] + 10**9), config, LocalGather()) < 0.2


def test_at_a_tiny_temperature_the_nearest_neighbour_decides() -> None:
    bank, queries = _digits()
    expected = _sklearn(bank, 1, 1.0).score(queries[0].numpy(), queries[1].numpy())
    config = EvaluationConfig(neighbours=200, temperature=1e-9)
    assert knn_accuracy(bank, queries, config, LocalGather()) == pytest.approx(expected, abs=1e-6)


def _accuracy_of_ranks(shares: list[float]) -> float:
    """Every rank brings its share of both sets."""
    gather = ProcessGroupGather()
    first, last = shares[gather.rank], shares[gather.rank + 1]
    bank, queries = (
        (
            features[int(len(features) * first) : int(len(features) * last)],
            labels[int(len(labels) * first) : int(len(labels) * last)],
        )
        for features, labels in _digits()
    )
    return knn_accuracy(bank, queries, EvaluationConfig(neighbours=20), gather)


@pytest.mark.parametrize("shares", [[0, 0.5, 1], [0, 0.3, 1], [0, 0, 1]])
def test_two_ranks_find_the_accuracy_of_one_process(shares: list[float], run_ranks: Callable) -> None:
    expected = knn_accuracy(*_digits(), EvaluationConfig(neighbours=20), LocalGather())
    assert 0.5 < expected < 1
    assert run_ranks(_accuracy_of_ranks, 2, shares) == [expected] * 2


def _views(sizes: list[int]) -> list[Views]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(sum(sizes), 3, 16, 16, generator=generator)
    labels = torch.arange(sum(sizes))
    return [
        Views((part,), part_labels, part_labels.numpy())
        for part, part_labels in zip(images.split(sizes), labels.split(sizes), strict=True)
    ]


def test_features_come_in_order_from_an_encoder_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(name="resnet8")).train()
    (features,), labels = embed([encoder], _views([5, 5, 2]), torch.device("cpu"))
    assert encoder.training
    assert all(module.training for module in encoder.modules())
    assert labels.tolist() == list(range(12))
    with torch.no_grad():
        expected = encoder.eval()(torch.cat([batch.images[0] for batch in _views([5, 5, 2])]))
    torch.testing.assert_close(features, expected)


def test_embedding_leaves_the_running_statistics_alone() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(name="resnet8")).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    embed([encoder], _views([8]), torch.device("cpu"))
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_raw_pixels_of_small_images_are_kept_as_they_are() -> None:
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    encoder = raw_pixels(16)
    assert torch.equal(encoder(images), images.flatten(1))
    assert encoder.dim == 3 * 16 * 16


def test_raw_pixels_of_large_images_are_means_over_squares() -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = image.numpy().reshape(1, 3, 32, 2, 32, 2).mean(axis=(3, 5)).reshape(1, -1)
    np.testing.assert_allclose(raw_pixels(64)(image).numpy(), expected, rtol=1e-6)


def test_no_views_give_no_features_of_the_right_width() -> None:
    (features, pixels), labels = embed(
        [build_encoder(EncoderConfig(name="resnet8")), raw_pixels(24)], [], torch.device("cpu")
    )
    assert features.shape == (0, 64)
    assert pixels.shape == (0, 3 * 24 * 24)
    assert labels.shape == (0,)
