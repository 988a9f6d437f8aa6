"""The colour matrices do to pixels what torchvision's colour operations do, in any order."""

import colorsys
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from pipelines.colour import colour_matrices
from pipelines.draws import Draws, draw
from pipelines.recipes import ViewRecipe

_UNCHANGED = (1.0, 1.0, 1.0, 0.0)
_TORCHVISIONS = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)

# torchvision rounds red's share of a grey value, 0.299, to 0.2989.
_TOLERANCE = 1e-4


def _draws(
    factors: tuple[float, ...], order: tuple[int, ...] = (0, 1, 2, 3), *, jitter=True, grey=False
) -> Draws:
    return _with_colours(1, jitter=[jitter], factors=[factors], order=[order], grey=[grey])


def _with_colours(count: int, **colours: Any) -> Draws:
    """Draws of which only those of the colours matter."""
    samples, sizes = np.arange(count), np.full((count, 2), 16)
    drawn = draw(ViewRecipe(), seed=0, epoch=0, view=0, samples=samples, sizes=sizes)
    return replace(drawn, **{name: np.array(values) for name, values in colours.items()})


def _recoloured(image: torch.Tensor, draws: Draws) -> torch.Tensor:
    pixel, mean = (torch.tensor(matrices[0], dtype=image.dtype) for matrices in colour_matrices(draws))
    flat = image.flatten(1)
    return (pixel @ flat + (mean @ flat.mean(dim=1))[:, None]).view_as(image)


@pytest.fixture
def image() -> torch.Tensor:
    """Away from black and white, so that torchvision clamps nothing."""
    return 0.35 + 0.2 * torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.3])
@pytest.mark.parametrize("kind", range(3), ids=["brightness", "contrast", "saturation"])
def test_one_operation_is_torchvisions(image: torch.Tensor, kind: int, factor: float):
    factors = (*_UNCHANGED[:kind], factor, *_UNCHANGED[kind + 1 :])
    expected = _TORCHVISIONS[kind](image, factor)
    torch.testing.assert_close(_recoloured(image, _draws(factors)), expected, rtol=0, atol=_TOLERANCE)


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_operations_in_any_order_are_torchvisions(image: torch.Tensor, order: tuple[int, ...]):
    factors = (1.2, 0.7, 1.4, 0.0)
    expected = image
    for kind in (kind for kind in order if kind < 3):
        expected = _TORCHVISIONS[kind](expected, factors[kind])
    torch.testing.assert_close(_recoloured(image, _draws(factors, order)), expected, rtol=0, atol=_TOLERANCE)


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_operations_are_applied_one_after_another_with_hue_among_them(
    image: torch.Tensor, order: tuple[int, ...]
):
    factors = (1.2, 0.7, 1.4, 0.2)
    expected = image
    for kind in order:
        alone = (*_UNCHANGED[:kind], factors[kind], *_UNCHANGED[kind + 1 :])
        expected = _recoloured(expected, _draws(alone))
    torch.testing.assert_close(_recoloured(image, _draws(factors, order)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("jitter", [False, True])
def test_grey_comes_after_the_jitter_and_is_torchvisions(image: torch.Tensor, jitter: bool):
    factors = (1.2, 0.7, 1.4, 0.1)
    before = _recoloured(image, _draws(factors, jitter=jitter))
    after = _recoloured(image, _draws(factors, jitter=jitter, grey=True))
    torch.testing.assert_close(after, functional.rgb_to_grayscale(before, 3), rtol=0, atol=_TOLERANCE)


def test_a_sample_without_jitter_keeps_its_colours(image: torch.Tensor):
    kept = _recoloured(image, _draws((0.3, 1.6, 0.1, 0.2), jitter=False))
    torch.testing.assert_close(kept, image, rtol=0, atol=0)


def test_samples_side_by_side_have_the_matrices_that_each_has_alone():
    random = np.random.default_rng(0)
    many = _with_colours(
        40,
        jitter=random.random(40) < 0.8,
        factors=random.uniform(0.2, 1.8, (40, 4)),
        order=np.argsort(random.random((40, 4)), axis=1),
        grey=random.random(40) < 0.3,
    )
    for n, matrices in enumerate(zip(*colour_matrices(many), strict=True)):
        jitter, grey = bool(many.jitter[n]), bool(many.grey[n])
        alone = colour_matrices(
            _draws(tuple(many.factors[n]), tuple(many.order[n]), jitter=jitter, grey=grey)
        )
        np.testing.assert_array_equal(np.stack(matrices), np.concatenate(alone))


@pytest.mark.parametrize("turns", [-0.5, -0.2, 0.07, 0.3])
def test_hue_keeps_greys(turns: float):
    grey = torch.linspace(0, 1, 9, dtype=torch.float64).expand(3, 1, 9)
    turned = _recoloured(grey, _draws((1, 1, 1, turns)))
    torch.testing.assert_close(turned, grey, rtol=0, atol=1e-6)


@pytest.mark.parametrize("turns", [0.0, 1.0])
def test_hue_by_no_turn_or_a_whole_one_changes_nothing(image: torch.Tensor, turns: float):
    torch.testing.assert_close(_recoloured(image, _draws((1, 1, 1, turns))), image, rtol=0, atol=1e-6)


@pytest.mark.parametrize("turns", [-0.2, -0.05, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("hue", np.arange(0, 1, 1 / 7))
def test_hue_shifts_that_of_hsv_within_two_and_a_half_degrees(hue: float, turns: float):
    # HSV measures hue along a hexagon, up to 1.12 degrees off the circle's angle at either end.
    colour = colorsys.hsv_to_rgb(hue, 0.5, 0.6)
    turned = _recoloured(torch.tensor(colour, dtype=torch.float64)[:, None, None], _draws((1, 1, 1, turns)))
    shift = colorsys.rgb_to_hsv(*turned.flatten().tolist())[0] - hue
    assert abs((shift - turns + 0.5) % 1 - 0.5) < 2.5 / 360
