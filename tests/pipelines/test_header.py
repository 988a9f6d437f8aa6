"""Headers tell the size that PIL shows, and what is torn, no image or too large, without decoding."""

import io
from collections.abc import Callable

import pytest
from PIL import Image

from pipelines.header import image_format, read_header
from pipelines.pillow import BadImageError

_MOST = 10_000_000


@pytest.fixture(scope="module")
def whole(pngs: list[bytes], decode: Callable[[bytes], Image.Image]) -> dict[str, bytes]:
    """One picture in every format and kind that is decoded."""
    picture = decode(pngs[1])
    grey = picture.convert("L")
    made: dict[str, tuple[Image.Image, str, dict]] = {
        "JPEG": (picture, "JPEG", {}),
        "progressive JPEG": (picture, "JPEG", {"progressive": True}),
        "PNG": (picture, "PNG", {}),
        "palette PNG": (picture.quantize(32), "PNG", {}),
        "PNG with alpha": (picture.convert("RGBA"), "PNG", {}),
        "16-bit PNG": (grey.convert("I;16"), "PNG", {}),
        "WebP": (picture, "WEBP", {}),
        "lossless WebP": (picture, "WEBP", {"lossless": True}),
        "BMP": (picture, "BMP", {}),
        "TIFF": (picture, "TIFF", {}),
        "LZW TIFF": (picture, "TIFF", {"compression": "tiff_lzw"}),
    }
    encoded = {}
    for kind, (image, name, options) in made.items():
        out = io.BytesIO()
        image.save(out, name, **options)
        encoded[kind] = out.getvalue()
    return encoded


def _reason(content: bytes | None, most: int = _MOST) -> str:
    with pytest.raises(BadImageError) as bad:
        read_header(content, max_pixels=most)
    return str(bad.value)


def _size(content: bytes) -> tuple[int, int]:
    header = read_header(content, max_pixels=_MOST)
    return header.height, header.width


def test_whole_images_have_the_size_that_pil_shows(
    whole: dict[str, bytes], kinds: dict[str, bytes], decode: Callable[[bytes], Image.Image]
):
    for kind, content in (whole | kinds).items():
        shown = decode(content)
        assert _size(content) == (shown.height, shown.width), kind


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9, 0.99])
def test_an_image_that_is_cut_off_anywhere_is_bad(whole: dict[str, bytes], share: float):
    for kind, content in whole.items():
        assert _reason(content[: int(share * len(content))]), kind


def test_a_jpeg_may_be_followed_by_padding_and_hold_a_thumbnail(whole: dict[str, bytes]):
    assert _size(whole["JPEG"] + bytes(40)) == (75, 50)
    thumbnail = b"\xff\xe1" + (2 + len(whole["JPEG"])).to_bytes(2, "big") + whole["JPEG"]
    nested = whole["JPEG"][:2] + thumbnail + whole["JPEG"][2:]
    assert _size(nested) == (75, 50)
    assert "truncated JPEG" in _reason(nested[:-40])


@pytest.mark.parametrize("content", [b"", None])
def test_nothing_is_no_image(content: bytes | None):
    assert _reason(content) == "no bytes"


@pytest.mark.parametrize(
    "content", [b"no image", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"BM", b"II*\0"]
)
def test_what_only_begins_like_an_image_is_bad(content: bytes):
    assert _reason(content)


def test_a_format_that_is_not_decoded_is_named(whole: dict[str, bytes]):
    out = io.BytesIO()
    Image.open(io.BytesIO(whole["PNG"])).save(out, "TGA")
    formats = "JPEG, PNG, WEBP, BMP, TIFF, GIF, AVIF, JPEG2000, PPM"
    assert _reason(out.getvalue()) == f"TGA is not decoded; {formats} are"
    assert image_format(out.getvalue()) == "TGA"
    assert _reason(b"\0\0\0\x18ftypheic" + bytes(100)) == "HEIC is not decoded; save it as JPEG or AVIF"


def test_a_decompression_bomb_is_told_by_its_header():
    out = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(out, "PNG")
    assert len(out.getvalue()) < 200_000
    assert _reason(out.getvalue()) == "30000 x 30000 pixels, more than data.max_pixels=10000000"
    bitmap = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bitmap, "TIFF", compression="group4")
    assert "pixels" in _reason(bitmap.getvalue())
