"""A GPU's views are the CPU's for the same draws, and do not depend on what surrounds them there either.

What two devices may differ by is stated for each operation, in grey levels of 255; none of it has been
measured yet.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.augment.dali import Request, make_views
from pipelines.augment.draws import Draws, draw
from pipelines.augment.effects import Effects
from pipelines.config import ViewRecipe

pytestmark = pytest.mark.gpu

_NOTHING: dict[str, Any] = {
    "flip": 0.0, "jitter": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0,
    "grey": 0.0, "blur": 0.0, "rotate": 0.0, "solarise": 0.0, "sobel": 0.0, "cutout": 0.0,
}  # fmt: skip
_ALL = {name: getattr(ViewRecipe(), name) for name in _NOTHING}

# Mean and largest difference. Crops and rotations are rounded to whole grey levels, of which either may be
# taken where a value lies halfway between two; what follows scales that level by its own factor.
_AGREEMENT: dict[str, tuple[dict[str, Any], float, float]] = {
    "crop": ({}, 0.02, 1.01),
    "centre crop": ({"centre_crop": 0.875}, 0.02, 1.01),
    "flip": ({"flip": 1.0}, 0.02, 1.01),
    "right angles": ({"rotate": 1.0, "flip": 0.5}, 0.02, 1.01),
    "rotation": ({"rotate": 1.0, "rotate_degrees": (-30, 30)}, 0.05, 2.01),
    "brightness": ({"jitter": 1.0, "brightness": 0.2}, 0.03, 1.25),
    "contrast": ({"jitter": 1.0, "contrast": 0.2}, 0.03, 1.5),
    "saturation": ({"jitter": 1.0, "saturation": 0.4}, 0.03, 2.5),
    "hue": ({"jitter": 1.0, "hue": 0.1}, 0.03, 2.5),
    "grey": ({"grey": 1.0}, 0.02, 1.01),
    "blur": ({"blur": 1.0}, 0.02, 1.01),
    "wide blur": ({"blur": 1.0, "size": 224}, 0.02, 1.01),
    "solarise": ({"solarise": 1.0}, 0.02, 1.01),
    "sobel": ({"sobel": 1.0}, 0.02, 1.51),
    "cutout": ({"cutout": 1.0}, 0.02, 1.01),
    "all, strong": (_ALL, 0.1, 12.0),
}


def _drawn(recipe: ViewRecipe, images: Sequence[Image.Image], view: int = 0) -> Draws:
    sizes = np.array([(image.height, image.width) for image in images])
    return draw(recipe, seed=1, epoch=0, view=view, samples=np.arange(len(images)), sizes=sizes)


def _rows(draws: Draws, rows: Sequence[int]) -> Draws:
    return Draws(**{field.name: getattr(draws, field.name)[list(rows)] for field in fields(Draws)})


def _request(encoded: Sequence[bytes], *draws: Draws, tag: Any = None) -> Request:
    images, orientation = [np.frombuffer(content, np.uint8) for content in encoded], []
    for content in encoded:
        try:
            orientation.append(Image.open(io.BytesIO(content)).getexif().get(0x0112, 1))
        except OSError:  # No image.
            orientation.append(1)
    return Request(images, draws, np.array(orientation), tag)


def _made(encoded: Sequence[bytes], recipe: ViewRecipe, draws: Draws, gpu: int | None = 0) -> torch.Tensor:
    requests = iter([_request(encoded, draws)])
    (((views,), _),) = make_views(requests, (recipe,), batch_size=len(encoded), threads=2, gpu=gpu)
    assert views.is_cuda == (gpu is not None)
    assert views.is_contiguous(memory_format=torch.channels_last)
    return views


def _levels(views: torch.Tensor, expected: torch.Tensor, recipe: ViewRecipe) -> torch.Tensor:
    """Absolute differences in grey levels of 255."""
    return (views.cpu() - expected).abs() * torch.tensor(recipe.std)[:, None, None] * 255


@pytest.mark.parametrize("operation", list(_AGREEMENT))
def test_a_view_is_the_cpus(operation: str, pngs: list[bytes], decode: Callable[[bytes], Image.Image]):
    settings, mean, largest = _AGREEMENT[operation]
    recipe = ViewRecipe(**(dict(_NOTHING, size=64) | settings))
    draws = _drawn(recipe, [decode(png) for png in pngs])
    off = _levels(_made(pngs, recipe, draws), _made(pngs, recipe, draws, gpu=None), recipe)
    assert off.mean() < mean
    assert off.max() < largest


_EVERYTHING = ViewRecipe(size=64, rotate=0.5, solarise=0.3, sobel=0.2, cutout=0.5)


def test_effects_on_the_same_crops_differ_by_rounding_alone(
    pngs: list[bytes], decode: Callable[[bytes], Image.Image]
):
    draws = _drawn(_EVERYTHING, [decode(png) for png in pngs])
    crops = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (len(pngs), 64, 64, 3), np.uint8))
    views = []
    for device in ("cuda", "cpu"):
        here = crops.to(device)
        views.append(Effects(_EVERYTHING, draws, here.device).apply(here, slice(None)))
    off = _levels(views[0], views[1], _EVERYTHING)
    # Where a value is solarised that lies on the threshold, the two sides of it differ by a level.
    assert off.mean() < 1e-3
    assert off.max() < 1.01


# nvJPEG rounds in its own way. Colours that it repeats where the CPU interpolates would be off by 1.7 levels.
@pytest.mark.parametrize(
    "kind", ["JPEG", "grey JPEG", "rotated JPEG", "PNG", "grey PNG", "rotated PNG", "WebP"]
)
def test_every_kind_of_image_is_decoded_as_on_the_cpu(
    kind: str, kinds: dict[str, bytes], decode: Callable[[bytes], Image.Image]
):
    recipe = ViewRecipe(size=96, **_NOTHING, centre_crop=1.0)
    draws = _drawn(recipe, [decode(kinds[kind])])
    made, expected = (_made([kinds[kind]], recipe, draws, gpu) for gpu in (0, None))
    off = _levels(made, expected, recipe)
    mean, largest = (0.7, 6.01) if "JPEG" in kind else (0.02, 1.01)
    assert off.mean() < mean
    assert off.max() < largest


def test_a_cmyk_jpeg_can_be_decoded(kinds: dict[str, bytes], decode: Callable[[bytes], Image.Image]):
    recipe = ViewRecipe(size=96, **_NOTHING, centre_crop=1.0)
    draws = _drawn(recipe, [decode(kinds["CMYK JPEG"])])
    made, expected = (_made([kinds["CMYK JPEG"]], recipe, draws, gpu) for gpu in (0, None))
    assert _levels(made, expected, recipe).mean() < 4


@pytest.fixture(scope="module")
def together(
    pngs: list[bytes], kinds: dict[str, bytes], decode: Callable[[bytes], Image.Image]
) -> tuple[list[bytes], ViewRecipe, Draws, torch.Tensor]:
    """Images of all kinds, many of them JPEGs, and their views made in one batch on the GPU."""
    encoded = pngs + 4 * list(kinds.values())
    draws = _drawn(_EVERYTHING, [decode(content) for content in encoded])
    return encoded, _EVERYTHING, draws, _made(encoded, _EVERYTHING, draws)


def test_a_view_is_bit_identical_alone_and_in_a_batch(together: Any):
    encoded, recipe, draws, views = together
    differing = [
        n
        for n in range(len(encoded))
        if not torch.equal(_made(encoded[n : n + 1], recipe, _rows(draws, [n]))[0], views[n])
    ]
    assert differing == []


def test_a_view_is_bit_identical_in_any_order_of_the_batch(together: Any):
    encoded, recipe, draws, views = together
    order = np.random.default_rng(0).permutation(len(encoded)).tolist()
    shuffled = _made([encoded[n] for n in order], recipe, _rows(draws, order))
    assert [n for n, row in enumerate(order) if not torch.equal(shuffled[n], views[row])] == []


def _stream(together: Any, batches: Sequence[Sequence[int]]) -> Iterator[Request]:
    encoded, _, draws, _ = together
    for rows in batches:
        yield _request([encoded[n] for n in rows], _rows(draws, rows), tag=rows)


def test_views_handed_out_are_never_overwritten(together: Any):
    # A GPU that is behind with its work must not be given the next batch in the memory of this one.
    _, recipe, _, views = together
    random = np.random.default_rng(1)
    batches = [random.choice(len(views), random.integers(1, 33)).tolist() for _ in range(100)]
    kept = []
    for (batch,), rows in make_views(
        _stream(together, batches), (recipe,), batch_size=32, threads=3, gpu=0
    ):  # fmt: skip
        torch.cuda._sleep(5_000_000)
        kept.append((batch, rows))
    assert [rows for _, rows in kept] == batches
    for batch, rows in kept:
        # Rounding alone may differ: whether it does, and by what surrounds a view, others ask.
        assert (batch - views[rows]).abs().max() < 0.05


def test_each_recipe_makes_its_own_view(together: Any, decode: Callable[[bytes], Image.Image]):
    encoded, recipe, draws, views = together
    other = ViewRecipe(size=24, **_NOTHING, centre_crop=0.5)
    centre = _drawn(other, [decode(content) for content in encoded])
    requests = iter([_request(encoded, draws, centre)])
    (((first, second), _),) = make_views(
        requests, (recipe, other), batch_size=len(encoded), threads=2, gpu=0
    )  # fmt: skip
    assert torch.equal(first, views)
    assert torch.equal(second, _made(encoded, other, centre))


def test_broken_images_are_found_and_cost_no_others_their_views(together: Any):
    encoded, recipe, draws, views = together
    broken = {2: [1], 3: [0, 3], 7: [2]}
    batches = [[(4 * batch + n) % len(encoded) for n in range(4)] for batch in range(10)]
    seen: dict[int, list[int]] = {}

    def requests() -> Iterator[Request]:
        for number, rows in enumerate(batches):
            images = [encoded[row] for row in rows]
            for place in broken.get(number, []):
                images[place] = b"no image at all"
            yield _request(images, _rows(draws, rows), tag=(number, rows))

    def repair(failed: Request, reasons: dict[int, str]) -> Request:
        number, rows = failed.tag
        seen[number] = list(reasons)
        kept = [row for place, row in enumerate(rows) if place not in reasons]
        return _request([encoded[row] for row in kept], _rows(draws, kept), tag=(number, kept))

    made = list(make_views(requests(), (recipe,), batch_size=4, threads=2, gpu=0, repair=repair))
    assert seen == broken
    assert [number for _, (number, _) in made] == list(range(10))
    for (batch,), (_, rows) in made:
        assert (batch - views[rows]).abs().max() < 0.05


def test_an_image_smaller_than_its_view_is_scaled_up_alike(decode: Callable[[bytes], Image.Image]):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)).save(out, "PNG")
    recipe = ViewRecipe(size=96, **_NOTHING)
    draws = _drawn(recipe, [decode(out.getvalue())])
    made, expected = (_made([out.getvalue()], recipe, draws, gpu) for gpu in (0, None))
    off = _levels(made, expected, recipe)
    assert off.mean() < 0.05
    assert off.max() < 1.01
