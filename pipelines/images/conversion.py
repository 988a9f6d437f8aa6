"""Convert images that DALI cannot decode correctly to PNG, as Pillow shows them."""

import atexit
import io
from functools import cache

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from pipelines.images.header import Header
from pipelines.images.isolation import Crash, Isolated
from pipelines.images.orientation import TRANSPOSES
from pipelines.images.pillow import BadImageError, opened, quiet, reason_of


def to_png_elsewhere(content: bytes | memoryview, header: Header) -> bytes:
    """Run to_png in another process. An image that crashes it raises BadImageError."""
    (png,) = _in_another_process().each([(bytes(content), header)])
    if isinstance(png, Crash):
        raise BadImageError(str(png))
    return png


@cache
def _in_another_process() -> Isolated[tuple[bytes, Header], bytes]:
    process = Isolated(_to_png)
    atexit.register(process.close)
    return process


def _to_png(item: tuple[bytes, Header]) -> bytes:
    return to_png(*item)


def to_png(content: bytes | memoryview, header: Header) -> bytes:
    """The image as PNG: upright, 8 bits per sample, the first picture if there are several.

    Raises BadImageError if Pillow cannot decode it, or if its size is not the one in its header.
    """
    image, out = shown(content, header.orientation), io.BytesIO()
    if image.size != (header.width, header.height):
        raise BadImageError(
            f"decodes to {image.width} x {image.height} pixels, its header says "
            f"{header.width} x {header.height}"
        )
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def shown(content: bytes | memoryview, orientation: int) -> Image.Image:
    """The image as Pillow shows it, upright, in grey or RGB. Raises BadImageError if it cannot be decoded."""
    try:
        with quiet():
            image = _opened(content)
            turned = _turns_itself(image)
            image.load()
            pixels = _in_eight_bits(image)
    except BadImageError:
        raise
    except Exception as error:  # Pillow may raise anything for broken bytes.
        raise BadImageError(f"its pixels cannot be decoded ({reason_of(error)})") from error
    # Write only the pixels, no colour profile and no transparent colour.
    pixels.info = {}
    if turned or orientation not in TRANSPOSES:
        return pixels
    return pixels.transpose(TRANSPOSES[orientation])


def _turns_itself(image: Image.Image) -> bool:
    """Whether Pillow turns the pixels upright: it does so for TIFF, unless the orientation is a BYTE."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    return not isinstance(image.tag_v2.get(ExifTags.Base.Orientation), bytes)


def _opened(content: bytes | memoryview) -> Image.Image:
    image = opened(content)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if tags.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 1:
        return image
    # Pillow's own decoder mixes up 16-bit samples in separate planes; libtiff does not.
    before, TiffImagePlugin.READ_LIBTIFF = TiffImagePlugin.READ_LIBTIFF, True
    try:
        return opened(content)
    finally:
        TiffImagePlugin.READ_LIBTIFF = before


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """The image in grey or RGB, with the highest 8 bits of longer samples."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format == "PPM"):
        return Image.fromarray((np.asarray(image).astype(np.int32) >> (_bits(image) - 8)).astype(np.uint8))
    if mode in ("I", "F"):
        raise BadImageError("its samples are numbers of unknown range; save it with 8 or 16 bits a sample")
    if mode in ("La", "RGBa"):
        image = image.convert(mode.upper())
    return image.convert("L" if mode in ("1", "L", "LA", "La") else "RGB")


def _bits(image: Image.Image) -> int:
    """Bits per sample in Pillow's pixels. Pillow does not scale TIFF's 12 bits to 16."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    return tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
