"""Jitter and greyscale equal torchvision's operations, in any order, clamped after each."""

from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from pipelines.augment.draws import BRIGHTNESS, Draws, draw
from pipelines.augment.effects import Colours
from pipelines.config import ViewRecipe

_UNCHANGED = (1.0, 1.0, 1.0, 0.0)
_TORCHVISIONS = (
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
    functional.adjust_hue,
)

# In grey levels of 255: torchvision rounds red's share of a grey value, 0.299, to 0.2989, and what follows
# scales that.
_TOLERANCE = 0.2


def _draws(recipe: ViewRecipe, count: int, **colours: Any) -> Draws:
    samples, sizes = np.arange(count), np.full((count, 2), 16)
    drawn = draw(recipe, seed=0, epoch=0, view=0, samples=samples, sizes=sizes)
    return replace(drawn, **{name: np.array(values) for name, values in colours.items()})


def _recoloured(images: torch.Tensor, draws: Draws, recipe: ViewRecipe | None = None) -> torch.Tensor:
    planes = images.clone()
    Colours(recipe or ViewRecipe(), draws, torch.device("cpu")).apply(planes, slice(0, len(planes)))
    return planes


def _torchvisions(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    views = []
    for n, image in enumerate(images / 255):
        view = image
        for kind in draws.order[n] if draws.jitter[n] else ():
            view = _TORCHVISIONS[kind](view, float(draws.factors[n, kind]))
        views.append(functional.rgb_to_grayscale(view, 3) if draws.grey[n] else view)
    return 255 * torch.stack(views)


def _images(count: int, size: int = 16) -> torch.Tensor:
    """Black, white and grey among all colours."""
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(count, 3, size, size, generator=generator) * 400 - 70).clamp(0, 255).round()
    images[:, :, 0] = images[:, :1, 0]  # The first row is grey.
    images[:, :, 1, :2], images[:, :, 1, 2:4] = 0, 255
    return images


@pytest.mark.parametrize("factor", [0.2, 0.9, 1.8])
@pytest.mark.parametrize("kind", range(3), ids=["brightness", "contrast", "saturation"])
def test_one_operation_is_torchvisions(kind: int, factor: float):
    factors = (*_UNCHANGED[:kind], factor, *_UNCHANGED[kind + 1 :])
    draws = _draws(ViewRecipe(), 3, jitter=[True] * 3, factors=[factors] * 3, grey=[False] * 3)
    expected = _TORCHVISIONS[kind](_images(3) / 255, factor) * 255
    torch.testing.assert_close(_recoloured(_images(3), draws), expected, rtol=0, atol=_TOLERANCE)


@pytest.mark.parametrize("turns", [-0.5, -0.2, 0.0, 0.07, 0.3, 0.5])
def test_the_hue_is_shifted_as_torchvision_does(turns: float):
    factors = (1.0, 1.0, 1.0, turns)
    draws = _draws(ViewRecipe(), 3, jitter=[True] * 3, factors=[factors] * 3, grey=[False] * 3)
    expected = functional.adjust_hue(_images(3) / 255, turns) * 255
    torch.testing.assert_close(_recoloured(_images(3), draws), expected, rtol=0, atol=1e-3)


def test_primary_colours_change_places_with_a_third_of_a_turn():
    primaries = 255 * torch.eye(3)[None, :, :, None]
    factors = [(1.0, 1.0, 1.0, 1 / 3)]
    draws = _draws(ViewRecipe(), 1, jitter=[True], factors=factors, grey=[False])
    torch.testing.assert_close(_recoloured(primaries, draws), primaries.roll(1, 1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_operations_in_any_order_are_torchvisions(order: tuple[int, ...]):
    # At full strength, so that many values are clamped on the way.
    strong = [(1.7, 0.3, 1.8, 0.2), (0.3, 1.8, 0.2, -0.2), (1.8, 1.8, 1.8, 0.1)]
    draws = _draws(ViewRecipe(), 3, jitter=[True] * 3, factors=strong, order=[order] * 3, grey=[False] * 3)
    expected = _torchvisions(_images(3), draws)
    torch.testing.assert_close(_recoloured(_images(3), draws), expected, rtol=0, atol=_TOLERANCE)


# 16 pixels a side are many views at a time, 224 are one.
@pytest.mark.parametrize(("count", "size"), [(200, 16), (9, 224)])
def test_drawn_jitter_and_grey_are_torchvisions(count: int, size: int):
    recipe = ViewRecipe(grey=0.3)
    draws = _draws(recipe, count)
    assert {bool(n) for n in draws.jitter} == {bool(n) for n in draws.grey} == {False, True}
    expected = _torchvisions(_images(count, size), draws)
    off = (_recoloured(_images(count, size), draws, recipe) - expected).abs()
    assert off.mean() < 0.02
    assert off.max() < 0.2


def test_a_sample_without_jitter_keeps_its_colours():
    draws = _draws(ViewRecipe(), 2, jitter=[False] * 2, grey=[False] * 2)
    assert torch.equal(_recoloured(_images(2), draws), _images(2))


def test_a_part_of_a_batch_is_changed_as_in_the_whole():
    draws, images = _draws(ViewRecipe(), 40), _images(40)
    whole, part = _recoloured(images, draws), images[7:23].clone()
    Colours(ViewRecipe(), draws, torch.device("cpu")).apply(part, slice(7, 23))
    assert torch.equal(part, whole[7:23])


# 57 pixels a side do not fill vector registers.
@pytest.mark.parametrize("size", [16, 57])
def test_a_view_has_the_same_bits_alone_and_beside_others(size: int):
    draws, images = _draws(ViewRecipe(grey=0.3), 40), _images(40, size)
    colours = Colours(ViewRecipe(grey=0.3), draws, torch.device("cpu"))
    together = images.clone()
    colours.apply(together, slice(0, 40))
    for n in range(40):
        alone = images[n : n + 1].clone()
        colours.apply(alone, slice(n, n + 1))
        assert torch.equal(alone[0], together[n])


# deepmind-research, byol/utils/augmentations.py: adjust_brightness adds a delta of at most the strength, and
# what comes out is clamped.
def test_brightness_is_added_where_the_recipe_says_so():
    recipe = ViewRecipe(
        jitter=1.0, brightness=0.4, brightness_by="shift", contrast=0.0, saturation=0.0, hue=0.0
    )
    draws = _draws(recipe, 50, grey=[False] * 50)
    deltas = torch.from_numpy(draws.factors[:, BRIGHTNESS])[:, None, None, None]
    assert -0.4 <= deltas.min() < -0.3
    assert 0.3 < deltas.max() <= 0.4
    expected = (_images(50).double() / 255 + deltas).clamp(0, 1) * 255
    torch.testing.assert_close(_recoloured(_images(50), draws, recipe).double(), expected, rtol=0, atol=1e-4)


def test_added_brightness_comes_in_its_turn():
    recipe = ViewRecipe(brightness_by="shift")
    images, factors = _images(1).double() / 255, (0.3, 1.6, 1.0, 0.0)
    for order, steps in (((0, 1, 2, 3), "bc"), ((1, 0, 2, 3), "cb")):
        expected = images
        for step in steps:
            added = (expected + factors[0]).clamp(0, 1)
            expected = added if step == "b" else functional.adjust_contrast(expected, factors[1])
        draws = _draws(recipe, 1, jitter=[True], factors=[factors], order=[order], grey=[False])
        found = _recoloured(_images(1), draws, recipe).double()
        torch.testing.assert_close(found, 255 * expected, rtol=0, atol=_TOLERANCE)
