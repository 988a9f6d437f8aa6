"""Images that DALI does not decode, or not right, to PNG, as Pillow shows them."""

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
    """The same as to_png in another process, so that an image that ends it is a bad one."""
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
    """The image upright, with 8 bits a sample; of several pictures the first.

    Raises BadImageError where Pillow cannot decode it, or to another size than its header says.
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
    """The image as Pillow shows it, in grey or RGB. Raises BadImageError where it cannot."""
    try:
        with quiet():
            image = _opened(content)
            turned = _turns_itself(image)
            image.load()
            pixels = _in_eight_bits(image)
    except BadImageError:
        raise
    except Exception as error:  # Of bytes that are broken, Pillow may raise anything.
        raise BadImageError(f"its pixels cannot be decoded ({reason_of(error)})") from error
    # Only pixels are to be written, no profile and no transparent colour.
    pixels.info = {}
    if turned or orientation not in TRANSPOSES:
        return pixels
    return pixels.transpose(TRANSPOSES[orientation])


def _turns_itself(image: Image.Image) -> bool:
    """Whether Pillow's pixels are upright: those of a TIFF are, unless its orientation is a BYTE."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    return not isinstance(image.tag_v2.get(ExifTags.Base.Orientation), bytes)


def _opened(content: bytes | memoryview) -> Image.Image:
    image = opened(content)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if tags.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 1:
        return image
    # By itself Pillow mixes up samples of 16 bits whose planes lie apart; libtiff does not.
    by_itself, TiffImagePlugin.READ_LIBTIFF = TiffImagePlugin.READ_LIBTIFF, True
    try:
        return opened(content)
    finally:
        TiffImagePlugin.READ_LIBTIFF = by_itself


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """The image in grey or RGB; of longer samples the highest 8 bits."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format == "PPM"):
        return Image.fromarray((np.asarray(image).astype(np.int32) >> (_bits(image) - 8)).astype(np.uint8))
    if mode in ("I", "F"):
        raise BadImageError(
            "its samples are numbers whose range nothing tells; save it with 8 or 16 bits a sample"
        )
    if mode in ("La", "RGBa"):
        image = image.convert(mode.upper())
    return image.convert("L" if mode in ("1", "L", "LA", "La") else "RGB")


def _bits(image: Image.Image) -> int:
    """Of a sample, as Pillow gives it: TIFF's 12 are not scaled to 16."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    return tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
