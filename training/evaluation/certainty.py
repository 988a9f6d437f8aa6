"""Margins, baselines and warnings for an accuracy."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

# The normal distribution's 97.5 % quantile.
_Z = 1.959964

# With fewer test images the margin of an accuracy of 50 % is 10 points or more.
FEW_IMAGES = 100

# Keys that go with the accuracies in a line of metrics.
COMPARED = ("evaluated_images", "majority_share", "chance", "bank_images", "trained_on_images")


def margin(accuracy: float, images: int) -> float:
    """How far the true accuracy may be from one measured on `images` images, in [0, 1], at 95 % confidence.

    The distance to the farther end of Wilson's score interval (Wilson 1927), which is above 0 even if all
    images, or none, are classified correctly. It does not cover the choice of training images or seed.
    """
    centre = (accuracy + _Z**2 / (2 * images)) / (1 + _Z**2 / images)
    half = _Z / (1 + _Z**2 / images) * (accuracy * (1 - accuracy) / images + (_Z / (2 * images)) ** 2) ** 0.5
    return max(accuracy - (centre - half), (centre + half) - accuracy)


def with_margins(accuracies: Mapping[str, float], images: int) -> dict[str, float]:
    """The accuracies, and for each KEY its KEY_margin."""
    margins = {f"{key}_margin": margin(value, images) for key, value in accuracies.items()}
    return {**accuracies, **margins}


def baselines(answers: Int[Tensor, " n"], known: Int[Tensor, " m"]) -> dict[str, float]:
    """Baselines for an accuracy on images whose labels are `answers`.

    evaluated_images: number of these images. majority_share: accuracy of always predicting their largest
    class. chance: accuracy of guessing among all classes, including those of `known`, the training labels.
    """
    largest = int(answers.unique(return_counts=True)[1].max())
    classes = len(torch.cat([answers, known]).unique())
    return {
        "evaluated_images": len(answers),
        "majority_share": largest / len(answers),
        "chance": 1 / classes,
    }


def shown(values: Mapping[str, Any], key: str, digits: int = 1) -> str:
    """An accuracy from a line of metrics with its margin, as in 35.0% ± 7.1."""
    accuracy = f"{values[key]:.{digits}%}"
    base = key.removesuffix("_test")
    margin_key = f"{base}_margin{key[len(base) :]}"
    return f"{accuracy} ± {100 * values[margin_key]:.{digits}f}" if margin_key in values else accuracy


def shown_baselines(values: Mapping[str, Any], suffix: str = "") -> str:
    """The number of evaluated images and the baselines, in words; empty for lines of older runs."""
    if f"evaluated_images{suffix}" not in values:
        return ""
    return (
        f"of {values[f'evaluated_images{suffix}']:,} images, of which the largest class has "
        f"{values[f'majority_share{suffix}']:.1%}; chance is {values[f'chance{suffix}']:.1%}"
    )


def doubts(values: Mapping[str, Any]) -> Iterator[str]:
    """Warnings about the accuracies of a line of metrics."""
    for suffix, which in (("", ""), ("_test", " of data.test")):
        images = values.get(f"evaluated_images{suffix}")
        if images is not None and images < FEW_IMAGES:
            yield (
                f"accuracies are of only {images:,} images{which}: at 50 % the margin is ± "
                f"{100 * margin(0.5, images):.0f} points; evaluate {FEW_IMAGES} or more"
            )
        if images and (twice := values.get(f"trained_on_images{suffix}", 0)):
            yield (
                f"{twice:,} of {images:,} evaluated images{which} are, byte for byte, among the "
                f"{values[f'bank_images{suffix}']:,} training images that they are compared with, so "
                "accuracies are too high; remove them from one of the two"
            )


def class_numbers(labels: Int[Tensor, " n"], values: Int[Tensor, " classes"]) -> Int[Tensor, " n"]:
    """Each label's index in the ascending `values`, or -1; without values, the labels themselves."""
    if not len(values):
        return labels
    places = torch.searchsorted(values, labels).clamp_max(len(values) - 1)
    return torch.where(values[places] == labels, places, -1)
