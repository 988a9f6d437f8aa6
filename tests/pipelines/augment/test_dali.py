"""DALI's views equal torchvision's for the same draws, and a view does not depend on its batch."""

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from pipelines.augment.dali import Request, make_views
from pipelines.augment.draws import Draws, draw
from pipelines.config import ViewRecipe

_PHOTOGRAPHS = Path(__file__).parents[4] / "shared/data/imagenet-sample"

_NOTHING: dict[str, Any] = {
    "flip": 0.0, "jitter": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0,
    "grey": 0.0, "blur": 0.0, "rotate": 0.0, "solarise": 0.0, "sobel": 0.0, "cutout": 0.0,
}  # fmt: skip
_STRONG = {name: getattr(ViewRecipe(), name) for name in _NOTHING}

# Mean and largest difference to torchvision, in grey levels of 255, measured and rounded up. Unless a comment
# says otherwise, the cause is float32 rounding. Crops and rotations are rounded to whole grey levels; a value
# halfway between two may become either.
_AGREEMENT: dict[str, tuple[dict[str, Any], float, float]] = {
    "crop": ({}, 2e-5, 5e-4),
    "centre crop": ({"centre_crop": 0.875}, 2e-5, 5e-4),
    "bicubic": ({"interpolation": "bicubic"}, 0.005, 1.01),
    "bicubic centre": ({"interpolation": "bicubic", "centre_crop": 0.875}, 0.005, 1.01),
    "flip": ({"flip": 1.0}, 2e-5, 5e-4),
    "brightness": ({"jitter": 1.0, "brightness": 0.2}, 3e-5, 5e-4),
    # torchvision rounds red's share of a grey value, 0.299, to 0.2989.
    "contrast": ({"jitter": 1.0, "contrast": 0.2}, 0.002, 0.005),
    "saturation": ({"jitter": 1.0, "saturation": 0.4}, 0.004, 0.01),
    "grey": ({"grey": 1.0}, 0.015, 0.03),
    # We leave out the taps beyond three sigma.
    "blur": ({"blur": 1.0}, 1e-4, 0.002),
    "wide blur": ({"blur": 1.0, "size": 224}, 0.001, 1.01),
    "right angles": ({"rotate": 1.0, "flip": 0.5}, 2e-5, 5e-4),
    "rotation": ({"rotate": 1.0, "rotate_degrees": (-30, 30)}, 3e-4, 1.01),
    "solarise": ({"solarise": 1.0}, 2e-5, 5e-4),
    "sobel": ({"sobel": 1.0}, 2e-5, 5e-4),
    "cutout": ({"cutout": 1.0}, 2e-5, 5e-4),
    "hue": ({"jitter": 1.0, "hue": 0.1}, 3e-5, 0.002),
    "all": (_STRONG, 0.01, 0.05),
}

_STEPS = (
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
    functional.adjust_hue,
)


def _bytes(encoded: Sequence[bytes]) -> list[np.ndarray]:
    return [np.frombuffer(content, np.uint8) for content in encoded]


@lru_cache
def _orientation(encoded: bytes) -> int:
    """As PIL finds it; 1 where there is no image."""
    try:
        return Image.open(io.BytesIO(encoded)).getexif().get(0x0112, 1)
    except OSError:
        return 1


def _request(encoded: Sequence[bytes], *draws: Draws, tag: Any = None) -> Request:
    return Request(_bytes(encoded), draws, np.array([_orientation(content) for content in encoded]), tag)


def _drawn(recipe: ViewRecipe, images: Sequence[Image.Image]) -> Draws:
    sizes = np.array([(image.height, image.width) for image in images])
    return draw(recipe, seed=1, epoch=0, view=0, samples=np.arange(len(images)), sizes=sizes)


def _rows(draws: Draws, rows: Sequence[int]) -> Draws:
    return Draws(**{field.name: getattr(draws, field.name)[list(rows)] for field in fields(Draws)})


def _made(encoded: Sequence[bytes], recipe: ViewRecipe, draws: Draws, threads: int = 2) -> torch.Tensor:
    request = _request(encoded, draws)
    (((views,), _),) = make_views(iter([request]), (recipe,), batch_size=len(encoded), threads=threads)
    return views


def _resized(image: Image.Image, box: Sequence[int], recipe: ViewRecipe) -> torch.Tensor:
    """PIL's resize of a box; like DALI's, it sees the pixels around the box. The last row is repeated."""
    margin = 64
    top, left, height, width = (int(side) for side in box)
    padded = np.pad(np.asarray(image, np.float32), [(margin, margin), (margin, margin), (0, 0)], "edge")
    region = (left + margin, top + margin, left + width + margin, top + height + margin)
    channels = [Image.fromarray(padded[:, :, channel].copy()) for channel in range(3)]
    kind = Image.Resampling[recipe.interpolation.upper()]
    resized = [channel.resize((recipe.size, recipe.size), kind, box=region) for channel in channels]
    # Rounded to whole grey levels after the resize, as PIL's own images are; bicubic leaves their range.
    levels = np.rint(np.stack([np.array(channel) for channel in resized])).clip(0, 255)
    return torch.from_numpy(levels) / 255


def _expected(image: Image.Image, recipe: ViewRecipe, draws: Draws, n: int) -> torch.Tensor:
    """The view as PIL and torchvision make it, step by step."""
    view = _resized(image, draws.box[n], recipe)
    if draws.flip[n]:
        view = functional.horizontal_flip(view)
    if draws.rotate[n]:
        view = functional.rotate(view, float(draws.angle[n]), functional.InterpolationMode.BILINEAR)
        view = (255 * view).round() / 255
    if draws.jitter[n]:
        for kind in draws.order[n]:
            view = _STEPS[kind](view, float(draws.factors[n, kind]))
    if draws.grey[n]:
        view = functional.rgb_to_grayscale(view, 3)
    if draws.blur[n]:
        taps = recipe.size // 10 // 2 * 2 + 1
        view = functional.gaussian_blur(view, [taps, taps], [float(draws.sigma[n])] * 2)
    if draws.solarise[n]:
        view = functional.solarize(view, recipe.solarise_threshold)
    if draws.sobel[n]:
        view = _sobel(view)
    view = functional.normalize(view, list(recipe.mean), list(recipe.std))
    if draws.cutout[n]:
        top, left, height, width = draws.hole[n].tolist()
        view = functional.erase(view, top, left, height, width, torch.zeros(3, 1, 1))
    return view


def _sobel(view: torch.Tensor) -> torch.Tensor:
    """Length of each channel's gradient, by torch's convolution, its border reflected."""
    down = torch.tensor([[-1.0, -2, -1], [0, 0, 0], [1, 2, 1]]) / 8
    padded = torch.nn.functional.pad(view[:, None], (1, 1, 1, 1), "reflect")
    gradient = torch.nn.functional.conv2d(padded, torch.stack([down, down.T])[:, None])
    return gradient.norm(dim=1)


def _levels(views: torch.Tensor, expected: torch.Tensor, recipe: ViewRecipe) -> torch.Tensor:
    """Absolute differences in grey levels of 255."""
    return (views - expected).abs() * torch.tensor(recipe.std)[:, None, None] * 255


@pytest.mark.parametrize("operation", list(_AGREEMENT))
def test_a_view_is_torchvisions(operation: str, pngs: list[bytes], decode: Callable[[bytes], Image.Image]):
    settings, mean, largest = _AGREEMENT[operation]
    recipe = ViewRecipe(**(dict(_NOTHING, size=64) | settings))
    images = [decode(png) for png in pngs]
    draws = _drawn(recipe, images)
    expected = torch.stack([_expected(image, recipe, draws, n) for n, image in enumerate(images)])
    off = _levels(_made(pngs, recipe, draws), expected, recipe)
    assert off.mean() < mean
    assert off.max() < largest


# How many pixels a filter reaches to each side, and what the inside, the whole and the rim may be off in grey
# levels. Ours is rounded to whole ones.
@pytest.mark.parametrize(
    ("interpolation", "reach", "inside", "mean", "rim"),
    [("bilinear", 1, 0.501, 0.6, 12), ("bicubic", 2, 0.52, 0.7, 25)],
)
def test_a_crop_is_torchvisions_resized_crop_but_for_its_rim(
    interpolation: Any, reach: int, inside: float, mean: float, rim: float, pngs: list[bytes],
    decode: Callable[[bytes], Image.Image],
):  # fmt: skip
    # Our filter sees the pixels just outside the box, torchvision's those of the box alone.
    recipe = ViewRecipe(size=32, interpolation=interpolation, **_NOTHING)
    images = [decode(png) for png in pngs]
    draws = _drawn(recipe, images)
    views = _made(pngs, recipe, draws)
    for n, image in enumerate(images):
        pixels = functional.to_dtype(functional.pil_to_tensor(image), torch.float32, scale=True)
        top, left, height, width = draws.box[n].tolist()
        kind = functional.InterpolationMode(interpolation)
        view = functional.resized_crop(pixels, top, left, height, width, [32, 32], kind, antialias=True)
        view = view.clamp(0, 1)  # Bicubic leaves the range.
        off = _levels(views[n], functional.normalize(view, list(recipe.mean), list(recipe.std)), recipe)
        # A pixel's filter reaches as many pixels of the image, or of the view where those are larger.
        rows, columns = (int(np.ceil(reach * max(1, 32 / side))) for side in (height, width))
        assert off[:, rows:-rows, columns:-columns].max() < inside
        assert off.mean() < mean
        assert off.max() < rim


# In photographs some values lie halfway between two grey levels before they are rounded, which the jitter
# then scales.
@pytest.mark.parametrize(
    ("settings", "mean", "largest"), [({}, 2e-5, 1.01), (_STRONG, 0.01, 3)], ids=["crop", "all"]
)
def test_a_view_of_a_photograph_is_torchvisions(
    settings: dict[str, Any], mean: float, largest: float, decode: Callable[[bytes], Image.Image]
):
    if not _PHOTOGRAPHS.is_dir():
        pytest.skip(f"needs the photographs at {_PHOTOGRAPHS}")
    encoded = pq.read_table(_PHOTOGRAPHS / "photos-00000-of-00002.parquet")["image"].to_pylist()[:12]
    images = [decode(content) for content in encoded]
    recipe = ViewRecipe(size=64, **(_NOTHING | settings))
    draws = _drawn(recipe, images)
    expected = torch.stack([_expected(image, recipe, draws, n) for n, image in enumerate(images)])
    off = _levels(_made(encoded, recipe, draws), expected, recipe)
    assert off.mean() < mean
    assert off.max() < largest


def test_every_kind_of_image_comes_out_upright_in_rgb(
    kinds: dict[str, bytes], decode: Callable[[bytes], Image.Image]
):
    recipe = ViewRecipe(size=96, **_NOTHING, centre_crop=1.0)
    images = [decode(content) for content in kinds.values()]
    assert {image.size for image in images} == {(160, 96)}
    draws = _drawn(recipe, images)
    views = _made(list(kinds.values()), recipe, draws)
    for n, (kind, image) in enumerate(zip(kinds, images, strict=True)):
        off = _levels(views[n], _expected(image, recipe, draws, n), recipe)
        assert off.max() < 1e-3, kind


_EVERYTHING = ViewRecipe(rotate=0.5, solarise=0.3, sobel=0.2, cutout=0.5)


@pytest.fixture(scope="module", params=[(64, None), (57, (-30, 30))], ids=["even", "odd"])
def together(
    request: pytest.FixtureRequest,
    pngs: list[bytes],
    kinds: dict[str, bytes],
    decode: Callable[[bytes], Image.Image],
):
    """Images of all kinds, their draws for all operations, and their views made in one batch."""
    encoded = pngs + list(kinds.values())
    size, degrees = request.param
    recipe = replace(_EVERYTHING, size=size, rotate_degrees=degrees)
    draws = _drawn(recipe, [decode(content) for content in encoded])
    return encoded, recipe, draws, _made(encoded, recipe, draws)


def test_a_view_is_bit_identical_alone_and_in_a_batch(together):
    encoded, recipe, draws, views = together
    for n in range(len(encoded)):
        assert torch.equal(_made(encoded[n : n + 1], recipe, _rows(draws, [n]))[0], views[n])


def test_a_view_is_bit_identical_in_any_order_of_the_batch(together):
    encoded, recipe, draws, views = together
    order = np.random.default_rng(0).permutation(len(encoded)).tolist()
    shuffled = _made([encoded[n] for n in order], recipe, _rows(draws, order))
    assert torch.equal(shuffled, views[order])


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_a_view_is_bit_identical_for_any_number_of_threads(together, threads: int):
    encoded, recipe, draws, views = together
    assert torch.equal(_made(encoded, recipe, draws, threads), views)


def test_a_view_is_bit_identical_late_in_a_long_stream_of_batches_of_any_size(together):
    encoded, recipe, draws, views = together
    random = np.random.default_rng(0)
    batches = [random.choice(len(encoded), random.integers(1, 12)).tolist() for _ in range(60)]
    requests = (_request([encoded[n] for n in rows], _rows(draws, rows), tag=rows) for rows in batches)
    made = list(make_views(requests, (recipe,), batch_size=12, threads=2))
    assert [tag for _, tag in made] == batches
    for (batch,), rows in made:
        assert torch.equal(batch, views[rows])


def test_views_handed_out_are_never_overwritten(together):
    # Every third batch is let go of, so that its memory is free to be used again.
    encoded, recipe, draws, views = together
    random = np.random.default_rng(1)
    batches = [random.choice(len(encoded), random.integers(1, 33)).tolist() for _ in range(150)]
    requests = (_request([encoded[n] for n in rows], _rows(draws, rows), tag=rows) for rows in batches)
    made = enumerate(make_views(requests, (recipe,), batch_size=32, threads=3))
    kept = [(batch, rows) for number, ((batch,), rows) in made if number % 3]
    assert len(kept) == 100
    for batch, rows in kept:
        assert torch.equal(batch, views[rows])


def test_the_callers_number_of_torchs_threads_stays(together):
    encoded, recipe, draws, _ = together
    before = torch.get_num_threads()
    _made(encoded, recipe, draws, threads=before + 1)
    assert torch.get_num_threads() == before


def test_views_are_channels_last_in_memory(together):
    _, _, _, views = together
    assert views.shape[1] == 3
    assert views.is_contiguous(memory_format=torch.channels_last)


def test_each_recipe_makes_its_own_view(together, decode: Callable[[bytes], Image.Image]):
    encoded, recipe, draws, views = together
    other = ViewRecipe(size=24, **_NOTHING, centre_crop=0.5)
    centre = _drawn(other, [decode(content) for content in encoded])
    request = _request(encoded, draws, centre)
    (((first, second), _),) = make_views(iter([request]), (recipe, other), batch_size=len(encoded), threads=2)
    assert torch.equal(first, views)
    assert torch.equal(second, _made(encoded, other, centre))


def test_an_image_that_cannot_be_decoded_is_an_error(together):
    encoded, recipe, draws, _ = together
    torn = encoded[0][: len(encoded[0]) // 2]
    with pytest.raises(RuntimeError, match="decod"):
        _made([b"no image at all"], recipe, _rows(draws, [0]))
    with pytest.raises(RuntimeError, match="decod"):
        _made([torn], recipe, _rows(draws, [0]))


# Positions of broken images in the 20 batches of a stream: first, last, one after another, all of a batch.
_BROKEN = {0: [2], 1: [0], 6: [0, 3], 7: [1], 8: [0, 1, 2, 3], 12: [3], 18: [1], 19: [0]}


def _stream(together: Any, broken: dict[int, list[int]]) -> Iterator[Request]:
    """Twenty batches of four images, some of them torn off halfway or no images at all."""
    encoded, _, draws, _ = together
    for batch in range(20):
        rows = [(4 * batch + n) % len(encoded) for n in range(4)]
        images = [encoded[row] for row in rows]
        for position in broken.get(batch, []):
            images[position] = [b"no image at all", images[position][:100]][position % 2]
        yield _request(images, _rows(draws, rows), tag=(batch, rows))


def _with_other_rows(together: Any, encoded: list[bytes]) -> Callable[[Request, dict[int, str]], Request]:
    """A repair that puts the next image of `encoded`, row by row, in place of each broken one."""
    _, _, draws, _ = together
    fresh = itertools.count()

    def repair(request: Request, reasons: dict[int, str]) -> Request:
        batch, rows = request.tag
        images, rows = [image.tobytes() for image in request.images], list(rows)
        for position in reasons:
            rows[position] = next(fresh)
            images[position] = encoded[rows[position]]
        return _request(images, _rows(draws, rows), tag=(batch, rows))

    return repair


def _made_with_repair(together: Any, repair: Any, threads: int = 2) -> list[tuple[torch.Tensor, Any]]:
    requests = _stream(together, _BROKEN)
    made = make_views(requests, (together[1],), batch_size=4, threads=threads, repair=repair)
    return [(views, tag) for (views,), tag in made]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_broken_image_costs_nothing_but_itself(together, threads: int):
    encoded, _, _, views = together
    seen: dict[int, list[int]] = {}
    replace = _with_other_rows(together, encoded)

    def repair(request: Request, reasons: dict[int, str]) -> Request:
        seen[request.tag[0]] = list(reasons)
        assert all(reason and "\n" not in reason for reason in reasons.values())
        return replace(request, reasons)

    made = _made_with_repair(together, repair, threads)
    assert seen == _BROKEN
    assert [batch for _, (batch, _) in made] == list(range(20))
    for batch, (_, rows) in made:
        assert torch.equal(batch, views[rows])
    expected = [request.tag[1] for request in _stream(together, {})]
    for batch, (_, (_, rows)) in enumerate(made):
        differing = [n for n in range(4) if rows[n] != expected[batch][n]]
        assert differing == _BROKEN.get(batch, [])


def test_a_repaired_request_that_is_broken_again_is_repaired_again(together):
    encoded, _, _, views = together
    pool = list(encoded)
    pool[0] = pool[1] = pool[4] = b"no image either"
    made = _made_with_repair(together, _with_other_rows(together, pool))
    assert [batch for _, (batch, _) in made] == list(range(20))
    for batch, (_, rows) in made:
        assert torch.equal(batch, views[rows])


def test_a_repair_may_make_a_batch_smaller(together):
    _, _, draws, views = together

    def without(request: Request, reasons: dict[int, str]) -> Request:
        batch, rows = request.tag
        kept = [n for n in range(len(rows)) if n not in reasons]
        # A batch cannot be empty: keep one image that can be decoded.
        rows = [rows[n] for n in kept] or [0]
        images = [request.images[n].tobytes() for n in kept] or together[0][:1]
        return _request(images, _rows(draws, rows), tag=(batch, rows))

    made = _made_with_repair(together, without)
    assert [len(batch) for batch, _ in made] == [
        4 - len(_BROKEN.get(n, [])) or 1 for n in range(20)
    ]  # fmt: skip
    for batch, (_, rows) in made:
        assert torch.equal(batch, views[rows])


def test_a_failure_that_no_image_is_to_blame_for_is_an_error(together):
    encoded, recipe, draws, _ = together
    wrong = replace(_rows(draws, [0]), box=draws.box[:2], flip=draws.flip[:2])
    request = _request(encoded[:1], wrong)

    def repair(request: Request, reasons: dict[int, str]) -> Request:
        raise AssertionError("there is nothing to repair")

    with pytest.raises(RuntimeError, match="batch size"):
        next(make_views(iter([request]), (recipe,), batch_size=1, threads=1, repair=repair))


def test_views_before_an_error_of_whoever_makes_the_requests_are_handed_out(together):
    def broken() -> Iterator[Request]:
        yield from itertools.islice(_stream(together, {}), 3)
        raise RuntimeError("the bucket is gone")

    made = make_views(broken(), (together[1],), batch_size=4, threads=1)
    assert [next(made)[1][0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="the bucket is gone"):
        next(made)


def test_an_error_of_whoever_makes_the_requests_is_passed_on():
    def broken():
        raise ValueError("row 7 is not an image")
        yield

    with pytest.raises(ValueError, match="row 7 is not an image"):
        next(make_views(broken(), (ViewRecipe(size=32),), batch_size=1, threads=1))
