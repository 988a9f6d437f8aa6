"""The draws follow torchvision's distributions, and each is a sample's own."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import ColorJitter, GaussianBlur, RandomResizedCrop, RandomRotation
from torchvision.transforms.v2 import functional

from pipelines.augment.draws import Draws, draw
from pipelines.config import ViewRecipe

_COUNT = 3000
_DIFFERENT = 1e-3
_RECIPE = ViewRecipe()
_CHOICES = ("flip", "rotate", "jitter", "grey", "blur", "solarise", "sobel", "cutout")


def _drawn(
    recipe: ViewRecipe = _RECIPE,
    *,
    size: tuple[int, int] = (300, 400),
    seed: int = 0,
    epoch: int = 0,
    view: int = 0,
) -> Draws:
    sizes = np.tile(size, (_COUNT, 1))
    return draw(recipe, seed=seed, epoch=epoch, view=view, samples=np.arange(_COUNT), sizes=sizes)


def _torchvision_boxes(size: tuple[int, int]) -> np.ndarray:
    image = torch.empty(3, *size)
    scale, ratio = list(_RECIPE.crop_scale), list(_RECIPE.crop_ratio)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(_COUNT)])


def _same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    test: Any = stats.ks_2samp(ours, theirs)
    return test.pvalue > _DIFFERENT


# In the last two sizes some or most samples fit no box, and fall back on a centre crop.
@pytest.mark.parametrize("size", [(300, 400), (400, 300), (96, 96), (30, 150), (150, 30)])
def test_boxes_are_distributed_as_torchvisions(size: tuple[int, int]):
    top, left, height, width = _drawn(size=size).box.T
    their_top, their_left, their_height, their_width = _torchvision_boxes(size).T
    assert _same(height * width, their_height * their_width)
    assert _same(width / height, their_width / their_height)
    assert _same(top, their_top)
    assert _same(left, their_left)


@pytest.mark.parametrize("size", [(20, 400), (400, 20)])
def test_an_image_that_no_box_fits_gets_torchvisions_centre_crop(size: tuple[int, int]):
    (theirs,) = np.unique(_torchvision_boxes(size), axis=0)
    (ours,) = np.unique(_drawn(size=size).box, axis=0)
    np.testing.assert_array_equal(ours, theirs)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 4000)), min_size=1, max_size=20).map(np.array),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted).map(tuple),
    st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)).map(sorted).map(tuple),
    st.none() | st.floats(0.01, 1),
    st.integers(0, 2**40),
)
def test_a_box_lies_inside_its_image(sizes, scale, ratio, centre_crop, seed):
    recipe = ViewRecipe(crop_scale=scale, crop_ratio=ratio, centre_crop=centre_crop)
    box = draw(recipe, seed=seed, epoch=0, view=0, samples=np.arange(len(sizes)), sizes=sizes).box
    assert (box[:, :2] >= 0).all()
    assert (box[:, 2:] >= 1).all()
    assert (box[:, :2] + box[:, 2:] <= sizes).all()


@pytest.mark.parametrize("size", [(300, 401), (57, 40), (33, 33), (1, 7)])
def test_the_whole_centre_square_is_torchvisions_center_crop_within_a_pixel(size: tuple[int, int]):
    top, left, height, width = _drawn(ViewRecipe(centre_crop=1.0), size=size).box[0]
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in size), indexing="ij")
    cropped = functional.center_crop(torch.stack([rows, columns]), [min(size)])
    assert [height, width] == list(cropped.shape[1:])
    assert np.abs(np.array([top, left]) - cropped[:, 0, 0].numpy()).max() <= 1


def test_jitter_is_distributed_as_torchvisions():
    ours = _drawn()
    bounds = [[0.2, 1.8]] * 3 + [[-0.2, 0.2]]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [ColorJitter.get_params(*bounds) for _ in range(_COUNT)]
    for kind, (low, high) in enumerate(bounds):
        factor = ours.factors[:, kind]
        assert low <= factor.min()
        assert factor.max() < high
        assert _same(factor, np.array([params[1 + kind] for params in theirs]))
    their_orders = np.array([params[0].tolist() for params in theirs])
    assert _same(ours.order @ [1000, 100, 10, 1], their_orders @ [1000, 100, 10, 1])


def test_every_order_of_the_jitter_is_as_likely():
    orders, counts = np.unique(_drawn().order, axis=0, return_counts=True)
    assert len(orders) == 24
    assert stats.chisquare(counts).pvalue > 0.01


def test_blur_sigmas_are_distributed_as_torchvisions():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [GaussianBlur.get_params(*_RECIPE.blur_sigma) for _ in range(_COUNT)]
    assert _same(_drawn().sigma, np.array(theirs))


def test_angles_are_distributed_as_torchvisions():
    recipe = replace(_RECIPE, rotate_degrees=(-30.0, 45.0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [RandomRotation.get_params([-30.0, 45.0]) for _ in range(_COUNT)]
    assert _same(_drawn(recipe).angle, np.array(theirs))


def test_right_angles_are_90_180_and_270_and_as_likely():
    angles, counts = np.unique(_drawn().angle, return_counts=True)
    assert angles.tolist() == [90, 180, 270]
    assert stats.chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize(("size", "share"), [(32, 0.5), (33, 0.2), (224, 1.0), (8, 0.01)])
def test_a_hole_is_what_of_a_square_around_any_pixel_lies_in_the_view(size: int, share: float):
    # DeVries & Taylor 2017, section 3.2, by their rule: a centre from all pixels, then clipped.
    top, left, height, width = _drawn(replace(_RECIPE, size=size, cutout_side=share)).hole.T
    side = max(1, round(share * size))
    centres = np.random.default_rng(0).integers(0, size, _COUNT)
    first = np.clip(centres - side // 2, 0, size)
    length = np.clip(centres - side // 2 + side, 0, size) - first
    for ours, theirs in ((top, first), (left, first), (height, length), (width, length)):
        assert _same(ours, theirs)
    assert (height.min() >= 1) & (width.max() <= side)


@pytest.mark.parametrize("choice", _CHOICES)
@pytest.mark.parametrize("probability", [0.0, 0.2, 0.8, 1.0])
def test_a_choice_is_made_as_often_as_the_recipe_says(choice: str, probability: float):
    chosen = getattr(_drawn(replace(_RECIPE, **{choice: probability})), choice)
    assert stats.binomtest(int(chosen.sum()), _COUNT, probability).pvalue > 0.01


def test_choices_of_a_sample_are_unrelated_within_a_view_and_between_views():
    columns = []
    recipe = replace(_RECIPE, **dict.fromkeys(_CHOICES, 0.5))
    for drawn in (_drawn(recipe, view=0), _drawn(recipe, view=1)):
        columns += [
            *drawn.factors.T,
            *drawn.box.T[:2],
            *drawn.hole.T[:2],
            drawn.angle,
            drawn.sigma,
            *(getattr(drawn, choice) for choice in _CHOICES),
        ]
    test: Any = stats.spearmanr(np.stack(columns, axis=1))
    related = test.pvalue[np.triu_indices(len(columns), k=1)]
    # Top and left are related through the size of the box; everything else is not.
    assert (related < 1e-4).sum() == 2


def test_a_samples_draws_do_not_depend_on_its_batch():
    random = np.random.default_rng(0)
    samples, sizes = random.permutation(10**6)[:50], random.integers(20, 500, (50, 2))
    together = draw(_RECIPE, seed=4, epoch=2, view=1, samples=samples, sizes=sizes)
    for n in range(50):
        alone = draw(_RECIPE, seed=4, epoch=2, view=1, samples=samples[n : n + 1], sizes=sizes[n : n + 1])
        for field in fields(Draws):
            np.testing.assert_array_equal(getattr(alone, field.name)[0], getattr(together, field.name)[n])


@pytest.mark.parametrize("other", [{"view": 1}, {"epoch": 1}, {"seed": 1}])
def test_two_views_and_epochs_and_seeds_of_a_sample_differ(other: dict[str, Any]):
    assert (_drawn().factors != _drawn(**other).factors).all()


def test_a_field_of_the_recipe_moves_nothing_but_its_own_draws():
    changed = _drawn(replace(_RECIPE, crop_scale=(0.5, 0.6), flip=0.1, brightness=0.1, rotate=0.3))
    for name in ("angle", "jitter", "order", "grey", "blur", "sigma", "solarise", "sobel", "cutout", "hole"):
        np.testing.assert_array_equal(getattr(changed, name), getattr(_drawn(), name))
    np.testing.assert_array_equal(changed.factors[:, 1:], _drawn().factors[:, 1:])


def test_the_draws_are_those_of_earlier_versions():
    # A run resumed with a newer version sees the same views as before.
    samples, sizes = np.array([7]), np.array([[300, 400]])
    drawn = draw(_RECIPE, seed=3, epoch=2, view=1, samples=samples, sizes=sizes)
    assert drawn.box.tolist() == [[46, 138, 219, 238]]
    assert (drawn.flip[0], drawn.jitter[0], drawn.grey[0], drawn.blur[0]) == (False, True, False, False)
    np.testing.assert_allclose(drawn.factors, [[1.370541, 1.512142, 1.161316, -0.157779]], atol=1e-6)
    assert drawn.order.tolist() == [[2, 0, 1, 3]]
    np.testing.assert_allclose(drawn.sigma, [0.167989], atol=1e-6)
    assert (drawn.angle.tolist(), drawn.hole.tolist()) == ([270], [[83, 11, 112, 112]])
