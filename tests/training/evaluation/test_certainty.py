"""How sure an accuracy is said to be, against SciPy's intervals, and what is said beside it."""

import pytest
import torch
from scipy.stats import binomtest

from training.evaluation.certainty import baselines, doubts, margin, shown, shown_baselines, with_margins


@pytest.mark.parametrize(("right", "images"), [(0, 10), (3, 10), (10, 10), (60, 172), (9000, 10_000), (1, 1)])
def test_a_margin_reaches_to_the_farther_end_of_scipys_wilson_interval(right: int, images: int) -> None:
    low, high = binomtest(right, images).proportion_ci(0.95, method="wilson")
    expected = max(right / images - low, high - right / images)
    assert margin(right / images, images) == pytest.approx(expected, abs=1e-6)


def test_an_accuracy_is_compared_with_chance_and_with_the_largest_class() -> None:
    answers, known = torch.tensor([7] * 6 + [3] * 4), torch.tensor([7, 3, 9, 9])
    assert baselines(answers, known) == {"evaluated_images": 10, "majority_share": 0.6, "chance": 1 / 3}


def test_an_accuracy_is_shown_with_its_margin_and_what_it_is_of() -> None:
    values = with_margins({"knn_top1": 0.35}, 172) | {
        "evaluated_images": 172, "majority_share": 0.35, "chance": 1 / 3,
    }  # fmt: skip
    assert shown(values, "knn_top1") == "35.0% ± 7.4"
    assert shown_baselines(values) == ("of 172 images, of which the largest class has 35.0%; chance is 33.3%")
    later = {f"{key}_test": value for key, value in values.items()}
    assert shown(later, "knn_top1_test") == "35.0% ± 7.4"
    # Of a run that an earlier version has left nothing is known.
    assert (shown({"knn_top1": 0.35}, "knn_top1"), shown_baselines({"knn_top1": 0.35})) == ("35.0%", "")


def test_few_images_and_those_that_were_trained_on_are_warned_of() -> None:
    fine = {"evaluated_images": 100, "trained_on_images": 0, "bank_images": 500}
    assert list(doubts(fine)) == []
    few, twice = doubts(fine | {"evaluated_images": 99, "trained_on_images": 4})
    assert few.startswith("accuracies are of only 99 images: at 50 % the margin is ± 10 points")
    assert "4 of 99 evaluated images are, byte for byte, among the 500 training images" in twice
    (test,) = doubts({"evaluated_images_test": 30})
    assert "30 images of data.test" in test
