"""A recipe fills what the user leaves unset, and what is not known is refused."""

from dataclasses import FrozenInstanceError, asdict, replace
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from pipelines.config import DataConfig
from pipelines.recipes import RECIPES, ViewRecipe


def test_a_named_recipe_is_the_view_where_nothing_else_is_set():
    for name, recipe in RECIPES.items():
        assert DataConfig(train="train", recipe=name).view == recipe


def test_fields_of_the_view_that_are_set_win_over_the_recipe():
    settings: dict[str, Any] = {"recipe": "simclr-cifar", "view": {"blur": 0.5, "hue": 0.2}}
    assert DataConfig(train="train", **settings).view == replace(RECIPES["simclr-cifar"], blur=0.5, hue=0.2)


def test_a_whole_view_wins_over_the_recipe():
    view = ViewRecipe(size=48)
    assert DataConfig(train="train", recipe="simclr-cifar", view=view).view == view


def test_a_dictionary_such_as_tomls_gives_what_arguments_give():
    settings: dict[str, Any] = {
        "train": "train",
        "recipe": "simclr-cifar",
        "view": {"size": 40, "crop_scale": [0.2, 1.0]},
    }
    read = TypeAdapter(DataConfig).validate_python(settings)
    assert read == DataConfig(**settings)
    assert read.view == replace(RECIPES["simclr-cifar"], size=40, crop_scale=(0.2, 1.0))


def test_a_config_comes_back_from_its_own_dictionary():
    data = DataConfig(train="train", test="test", recipe="simclr-cifar", view=ViewRecipe(size=40))
    assert TypeAdapter(DataConfig).validate_python(asdict(data)) == data
    assert TypeAdapter(DataConfig).validate_json(TypeAdapter(DataConfig).dump_json(data)) == data


def test_the_recipes_are_simclrs():
    # Chen et al. 2020: appendix A with strength 1, and appendix B.9 with strength 0.5 and no blur.
    for name, strength, blur in (("simclr", 1.0, 0.5), ("simclr-cifar", 0.5, 0.0)):
        recipe = RECIPES[name]
        jitter = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
        assert jitter == tuple(strength * most for most in (0.8, 0.8, 0.8, 0.2))
        assert (recipe.flip, recipe.jitter, recipe.grey, recipe.blur) == (0.5, 0.8, 0.2, blur)
        assert (recipe.crop_scale, recipe.crop_ratio) == ((0.08, 1.0), (3 / 4, 4 / 3))


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
        ({"evaluation_crop": 1.1}, "evaluation_crop"),
        ({"window_rows": 0}, "window_rows"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(settings: dict[str, Any], named: str):
    with pytest.raises(ValidationError, match=named):
        DataConfig(train="train", **settings)


def test_training_images_must_be_given():
    with pytest.raises(ValidationError, match="train"):
        DataConfig()  # pyright: ignore[reportCallIssue]


def test_a_config_is_frozen():
    data = DataConfig(train="train")
    with pytest.raises(FrozenInstanceError):
        data.train = "other"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(FrozenInstanceError):
        data.view.size = 8  # pyright: ignore[reportAttributeAccessIssue]
