"""Whatever bytes an image has, reading it gives its size or a reason, and no other exception."""

import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from pipelines.images.conversion import to_png
from pipelines.images.header import image_format, read_header
from pipelines.images.pillow import BadImageError

_EXIF = Image.Exif()
_EXIF[0x0112], _EXIF[0x010F] = 6, "maker"
_XMP = b'<rdf:Description tiff:Orientation="6"/>'

# Options of Pillow's writers, so that there is something to break; how many mutations, most of quick formats.
_SEEDS: dict[str, tuple[dict, int]] = {
    "JPEG": ({"exif": _EXIF, "xmp": _XMP}, 25_000),
    "PNG": ({"exif": _EXIF}, 25_000),
    "WEBP": ({"exif": _EXIF, "xmp": _XMP, "lossless": True}, 25_000),
    "TIFF": ({"tiffinfo": {0x0112: 6, 700: _XMP}}, 4_000),
    "BMP": ({}, 5_000),
    "GIF": ({}, 5_000),
    "AVIF": ({"exif": _EXIF, "quality": 30}, 3_000),
    "JPEG2000": ({}, 3_000),
    "PPM": ({}, 2_000),
    "DDS": ({}, 3_000),
}


def _mutations(kind: str, count: int) -> Iterator[bytes]:
    """A small image's bytes, changed, lengthened, shortened and cut off; most changes are near the front."""
    random = np.random.default_rng([count, len(kind)])
    out = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (5, 7, 3), np.uint8)).save(out, kind, **_SEEDS[kind][0])
    for places, ways, values in zip(
        random.random((count, 4)),
        random.integers(0, 5, (count, 4)),
        random.integers(0, 256, (count, 4)),
        strict=True,
    ):
        content = bytearray(out.getvalue())
        for place, way, value in zip(places.tolist(), ways.tolist(), values.tolist(), strict=True):
            at = int(place * place * len(content))
            if way == 0:
                content[at : at + 1] = bytes([value])
            elif way == 1:
                content[at:at] = bytes([value] * (1 + value % 8))
            elif way == 2:
                del content[at : at + 1 + value % 8]
            elif way == 3:
                content[at : at + 1] = bytes(byte ^ 1 << value % 8 for byte in content[at : at + 1])
            elif value < 64:
                del content[int(place * len(content)) :]
        yield bytes(content)


@pytest.mark.parametrize("kind", _SEEDS)
def test_a_header_with_any_bytes_changed_gives_a_size_or_a_reason(kind: str):
    good, reasons = 0, []
    for content in _mutations(kind, _SEEDS[kind][1]):
        try:
            header = read_header(memoryview(content), max_pixels=10_000)
        except BadImageError as error:
            reasons.append(str(error))
            continue
        assert 1 <= header.height * header.width <= 10_000
        assert header.orientation in range(1, 9)
        good += 1
    # Some are whole still, unless the format is not read.
    assert len(reasons) > 100
    assert all(reason and "\n" not in reason for reason in reasons)
    assert (good > 20) != (kind == "DDS")


@pytest.mark.parametrize("kind", ["GIF", "AVIF", "JPEG2000", "PPM", "TIFF", "BMP"])
def test_pixels_with_any_bytes_changed_are_converted_or_give_a_reason(kind: str):
    converted, reasons = 0, []
    for content in _mutations(kind, 600):
        try:
            header = read_header(content, max_pixels=10_000)
            png = to_png(content, header)
        except BadImageError as error:
            reasons.append(str(error))
            continue
        assert read_header(png, max_pixels=10_000) == header.upright
        converted += 1
    assert converted
    assert all(reason and "\n" not in reason for reason in reasons)


@pytest.mark.parametrize(
    "exif", [b"", b"M", b"MM\0", b"MM\0*", b"MM\0*\0", b"II*\0\x08\0\0\0\xff\xff", b"\xff" * 40]
)
def test_an_image_with_broken_exif_data_is_shown_as_it_is_stored(exif: bytes):
    out = io.BytesIO()
    Image.new("RGB", (64, 48), (9, 99, 200)).save(out, "JPEG")
    segment = b"Exif\0\0" + exif
    told = b"\xff\xe1" + (2 + len(segment)).to_bytes(2, "big") + segment
    content = out.getvalue()[:2] + told + out.getvalue()[2:]
    assert read_header(content, max_pixels=10_000) == (48, 64, 1, False)


def test_an_avif_whose_main_picture_is_missing_is_bad():
    out = io.BytesIO()
    Image.effect_noise((64, 48), 90).convert("RGB").save(out, "AVIF")
    content = bytearray(out.getvalue())
    content[content.find(b"pitm") + 9] ^= 7
    with pytest.raises(BadImageError, match="its header is broken"):
        read_header(bytes(content), max_pixels=10_000)
    assert image_format(bytes(content)) == "unknown"
