"""A recipe fills unset fields, and unknown fields are refused."""

from dataclasses import FrozenInstanceError, asdict, replace
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from pipelines.config import RECIPES, DataConfig, ViewRecipe


def _config(**settings: Any) -> DataConfig:
    return DataConfig(train="train", **settings)


@pytest.mark.parametrize("name", RECIPES)
def test_a_named_recipe_gives_both_views_where_nothing_else_is_set(name: str):
    assert _config(recipe=name).views == RECIPES[name]


def test_simclr_is_the_recipe_where_none_is_named():
    assert _config().views == RECIPES["simclr"]


def test_fields_of_the_view_that_are_set_win_over_both_of_the_recipes():
    first, second = RECIPES["byol"]
    views = _config(recipe="byol", view={"blur": 0.5, "hue": 0.2}).views
    assert views == (replace(first, blur=0.5, hue=0.2), replace(second, blur=0.5, hue=0.2))


def test_fields_of_the_second_view_win_for_it_alone():
    first, second = RECIPES["byol"]
    views = _config(recipe="byol", view={"grey": 0.1}, second_view={"grey": 0.3, "sobel": 0.1}).views
    assert views == (replace(first, grey=0.1), replace(second, grey=0.3, sobel=0.1))


def test_a_whole_view_wins_over_the_recipe():
    view = ViewRecipe(size=48)
    assert _config(recipe="simclr-cifar", view=view).views == (view, view)
    other = replace(view, sobel=1.0)
    assert _config(recipe="simclr-cifar", view=view, second_view=other).views == (view, other)


def test_a_dictionary_such_as_tomls_gives_what_arguments_give():
    settings: dict[str, Any] = {
        "train": "train",
        "recipe": "simclr-cifar",
        "view": {"size": 40, "crop_scale": [0.2, 1.0], "rotate": 0.5, "rotate_degrees": [-30, 30]},
        "second_view": {"flip": 0.1},
    }
    read = TypeAdapter(DataConfig).validate_python(settings)
    assert read == DataConfig(**settings)
    changes: dict[str, Any] = {
        "size": 40,
        "crop_scale": (0.2, 1.0),
        "rotate": 0.5,
        "rotate_degrees": (-30, 30),
    }
    (recipe, _) = RECIPES["simclr-cifar"]
    assert read.views == (replace(recipe, **changes), replace(recipe, **changes, flip=0.1))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_config_comes_back_from_its_own_dictionary(recipe: str):
    data = _config(test="test", recipe=recipe, view={"size": 40}, second_view={"flip": 0.2})
    assert TypeAdapter(DataConfig).validate_python(asdict(data)) == data
    assert TypeAdapter(DataConfig).validate_json(TypeAdapter(DataConfig).dump_json(data)) == data
    assert replace(data, train="elsewhere").views == data.views


def test_the_recipes_are_simclrs():
    # Chen et al. 2020: appendix A with strength 1, and appendix B.9 with strength 0.5 and no blur.
    for name, strength, blur in (("simclr", 1.0, 0.5), ("simclr-cifar", 0.5, 0.0)):
        recipe, second = RECIPES[name]
        assert recipe == second
        jitter = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
        assert jitter == tuple(strength * most for most in (0.8, 0.8, 0.8, 0.2))
        assert (recipe.flip, recipe.jitter, recipe.grey, recipe.blur) == (0.5, 0.8, 0.2, blur)
        assert (recipe.crop_scale, recipe.crop_ratio) == ((0.08, 1.0), (3 / 4, 4 / 3))
        assert (recipe.rotate, recipe.solarise, recipe.sobel, recipe.cutout) == (0, 0, 0, 0)


def test_the_byol_recipe_is_byols_with_two_views_that_differ():
    # Grill et al. 2020, table 6: blur and solarisation are all that differs.
    first, second = RECIPES["byol"]
    for recipe, blur, solarise in ((first, 1.0, 0.0), (second, 0.1, 0.2)):
        assert (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue) == (0.4, 0.4, 0.2, 0.1)
        assert (recipe.flip, recipe.jitter, recipe.grey) == (0.5, 0.8, 0.2)
        assert (recipe.blur, recipe.solarise, recipe.solarise_threshold) == (blur, solarise, 0.5)
        assert (recipe.crop_scale, recipe.crop_ratio, recipe.blur_sigma) == (
            (0.08, 1),
            (3 / 4, 4 / 3),
            (0.1, 2),
        )


def test_the_supervised_recipe_crops_and_flips_and_evaluation_does_nothing_random():
    choices = ("rotate", "jitter", "grey", "blur", "solarise", "sobel", "cutout")
    for name, flip, centre_crop in (("supervised", 0.5, None), ("evaluation", 0.0, 0.875)):
        for recipe in RECIPES[name]:
            assert [getattr(recipe, choice) for choice in choices] == [0] * len(choices)
            assert (recipe.flip, recipe.centre_crop) == (flip, centre_crop)


@pytest.mark.parametrize(
    "settings",
    [
        {"view": {"jitter": 0}},
        {"recipe": "simclr-cifar", "view": {"jitter": 0}},
        {"recipe": "byol", "view": {"solarise_threshold": 0.3}},
        {"view": {"cutout": 0.5, "cutout_side": 0.2}},
        {"view": {"cutout_side": 0.2}, "second_view": {"cutout": 0.5}},
        {"view": {"centre_crop": 0.9}},
    ],
)
def test_a_setting_that_has_an_effect_on_a_view_is_taken(settings: dict[str, Any]):
    _config(**settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"recipe": "simclr-v9"}, "no recipe 'simclr-v9'; there are simclr, simclr-cifar"),
        ({"colour_column": "rgb"}, "colour_column"),
        ({"view": {"colour": 1}}, "colour"),
        ({"view": {"size": 7}}, "size"),
        ({"view": {"flip": 1.5}}, "flip"),
        ({"view": {"hue": 0.6}}, "hue"),
        ({"view": {"centre_crop": 0}}, "centre_crop"),
        ({"view": {"crop_scale": [1.0, 0.5]}}, "needs two numbers with 0 < low <= high, got 1.0 0.5"),
        ({"view": {"blur_sigma": [0, 2]}}, "needs two numbers with 0 < low <= high, got 0.0 2.0"),
        ({"view": {"crop_scale": [0.5, 1.5]}}, "crop_scale"),
        ({"view": {"std": [0.2, 0.0, 0.2]}}, "std"),
        ({"view": "simclr"}, "view"),
        ({"second_view": {"hue": 0.6}}, "second_view"),
        ({"view": {"rotate": 0.5, "rotate_degrees": [30, -30]}}, "needs two angles"),
        ({"view": {"rotate": 0.5, "rotate_degrees": [0, 400]}}, "needs two angles"),
        ({"view": {"cutout": 0.5, "cutout_side": 0}}, "cutout_side"),
        ({"second_view": {"size": 96}}, "view.size=224 and second_view.size=96.*set the same for both"),
        ({"view": {"rotate_degrees": [-9, 9]}}, "view: rotate_degrees has no effect with rotate=0"),
        ({"view": {"solarise_threshold": 0.3}}, "view: solarise_threshold has no effect with solarise=0"),
        ({"view": {"cutout_side": 0.3}}, "view: cutout_side has no effect with cutout=0"),
        ({"view": {"jitter": 0, "hue": 0.1}}, "view: hue has no effect with jitter=0"),
        ({"second_view": {"blur": 0, "blur_sigma": [1, 2]}}, "second_view: blur_sigma has no effect"),
        (
            {"view": {"centre_crop": 1, "crop_ratio": [1, 2]}},
            "view: crop_ratio has no effect with centre_crop",
        ),
        ({"view": {"size": 19}}, "view: blur has no effect at size=19"),
        ({"evaluation_crop": 1.1}, "evaluation_crop"),
        ({"window_rows": 0}, "window_rows"),
        ({"window_bytes": 0}, "window_bytes"),
        (
            {"window_rows": 8, "window_bytes": 9},
            "window_bytes=9 has no effect beside window_rows=8; leave out",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(settings: dict[str, Any], named: str):
    with pytest.raises(ValidationError, match=named):
        DataConfig(train="train", **settings)


def test_what_is_wrong_in_the_view_is_said_once():
    with pytest.raises(ValidationError) as refused:
        _config(view={"hue": 0.6})
    assert [error["loc"] for error in refused.value.errors()] == [("view", "hue")]


def test_training_images_must_be_given():
    with pytest.raises(ValidationError, match="train"):
        DataConfig()  # pyright: ignore[reportCallIssue]


def test_a_config_is_frozen():
    data = DataConfig(train="train")
    with pytest.raises(FrozenInstanceError):
        data.train = "other"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(FrozenInstanceError):
        data.view.size = 8  # pyright: ignore[reportAttributeAccessIssue]
