"""EXIF orientations 1 to 8: how a stored image must be turned or mirrored to be shown; 1 is upright."""

import io
import zlib
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from PIL import ExifTags, Image, PngImagePlugin

from pipelines.images.pillow import quiet

UPRIGHT = 1

# Orientations whose stored rows are columns of the image as shown.
SIDEWAYS = (5, 6, 7, 8)
_IS_SIDEWAYS = np.isin(np.arange(9), SIDEWAYS)
# For each orientation, whether the shown image runs backwards along the stored rows, and the stored columns.
_BACKWARDS = np.stack([np.isin(np.arange(9), (3, 4, 6, 7)), np.isin(np.arange(9), (2, 3, 7, 8))], axis=1)

TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# PNG chunks in which Pillow looks for an orientation besides eXIf: texts with these keys.
_TEXTS = (b"iTXt", b"tEXt", b"zTXt")
_KEYS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"exif\0", b"xmp\0")


def orientation_of(image: Image.Image) -> int:
    """The orientation that Pillow finds in the image's EXIF data, else in its XMP; else upright.

    Unlike Pillow, accepts a single BYTE.
    """
    xmp = {key: value for key, value in image.info.items() if "xmp" in str(key)}
    for source in (image, _holding(xmp)):
        try:
            with quiet():
                found = source.getexif().get(ExifTags.Base.Orientation)
        except Exception:  # Pillow may raise anything; the XMP may still be intact.
            continue
        if isinstance(found, bytes) and len(found) == 1:
            found = found[0]  # A BYTE, which Pillow does not convert to a number.
        # The value may be of any type.
        return next((known for known in TRANSPOSES if known == found), UPRIGHT)
    return UPRIGHT


def orientation_in(metadata: dict[Any, Any]) -> int:
    """The orientation in `metadata`, in the form of Pillow's Image.info."""
    return orientation_of(_holding(metadata)) if metadata else UPRIGHT


def orientation_in_png(chunks: list[tuple[bytes, bytes]]) -> int:
    """The orientation in a PNG's chunks, those for which `tells_orientation` is true."""
    if not chunks:
        return UPRIGHT
    # In a picture of one pixel, because Pillow checks the size of what it opens.
    pixel = (b"IHDR", bytes([0, 0, 0, 1, 0, 0, 0, 1, 8, 0, 0, 0, 0]))
    whole = b"".join(_chunk(kind, data) for kind, data in [pixel, *chunks, (b"IDAT", b"")])
    try:
        with quiet():
            info = PngImagePlugin.PngImageFile(io.BytesIO(b"\x89PNG\r\n\x1a\n" + whole)).info
    except Exception:  # As above.
        return UPRIGHT
    return orientation_in(info)


def tells_orientation(kind: bytes, start: bytes) -> bool:
    """Whether a PNG chunk that starts with `start` may hold an orientation."""
    return kind == b"eXIf" or (kind in _TEXTS and start.startswith(_KEYS))


def is_sideways(orientation: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Whether rows of the stored image are columns of the shown one."""
    return _IS_SIDEWAYS[orientation]


def backwards(orientation: Int[np.ndarray, " n"]) -> Bool[np.ndarray, "n 2"]:
    """Whether the shown image runs backwards along the stored rows, and along the stored columns."""
    return _BACKWARDS[orientation]


def turned(pairs: Int[np.ndarray, "n 2"], orientation: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n 2"]:
    """Convert pairs along the axes of the shown image to those of the stored image, or back."""
    return np.where(is_sideways(orientation)[:, None], pairs[:, ::-1], pairs)


def _holding(info: dict[Any, Any]) -> Image.Image:
    image = Image.Image()
    image.info = info
    return image


def _chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
