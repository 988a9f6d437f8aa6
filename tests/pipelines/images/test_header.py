"""Headers give the size that PIL shows, and find truncated, oversized and non-images without decoding."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pipelines.images.conversion import to_png
from pipelines.images.header import image_format, read_header
from pipelines.images.pillow import BadImageError

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


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


_GREY = Image.linear_gradient("L").resize((40, 30))
_COLOUR = Image.merge("RGB", (_GREY, _GREY.transpose(Image.Transpose.ROTATE_180), _GREY))
_BMP = _saved(_GREY, "BMP")


def _with_chunk_before_exif() -> bytes:
    """A WebP whose EXIF data follow an XMP chunk of odd length."""
    plain = _saved(_COLOUR, "WEBP", lossless=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0", xmp=b"<x/>")
    exif = plain.index(b"EXIF")
    odd = b"XMP " + (5).to_bytes(4, "little") + b"<xy/>\0"
    body = plain[8:exif] + odd + plain[exif : plain.index(b"XMP ", exif)]
    return b"RIFF" + len(body).to_bytes(4, "little") + body


# Files on which DALI fails, or which it shows in other colours.
_FOR_PILLOW = {
    "WebP with an odd chunk before its EXIF data": _with_chunk_before_exif(),
    "BMP with a short palette": (
        _BMP[:10] + (54 + 4 * 128).to_bytes(4, "little") + _BMP[14:46] + bytes(8) + _BMP[54:566] + _BMP[1078:]
    ),
    "JPEG with a restart marker among its headers": (lambda jpeg: jpeg[:2] + b"\xff\xd0" + jpeg[2:])(
        _saved(_COLOUR, "JPEG", quality=95)
    ),
    "TIFF with its bits reversed": _saved(_GREY, "TIFF", tiffinfo={266: 2}),
}  # fmt: skip


@pytest.mark.parametrize("kind", _FOR_PILLOW)
def test_pillow_takes_what_dali_gets_wrong(kind: str):
    content = _FOR_PILLOW[kind]
    header = read_header(content, max_pixels=10**6)
    assert header.for_pillow
    with Image.open(io.BytesIO(to_png(content, header))) as png:
        shown = np.asarray(png.convert("RGB"))
    with Image.open(io.BytesIO(content)) as image:
        np.testing.assert_array_equal(shown, np.asarray(image.convert("RGB")))


def test_a_png_that_does_not_begin_with_its_size_is_named():
    png = _saved(_COLOUR, "PNG")
    iphone = png[:8] + b"\0\0\0\x04CgBI\x50\0\x20\x02\0\0\0\0" + png[8:]
    with pytest.raises(BadImageError, match="does not begin with its size, like those of iPhones"):
        read_header(iphone, max_pixels=10**6)
