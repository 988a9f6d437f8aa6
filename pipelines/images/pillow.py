"""Open images with Pillow, without its warnings and its pixel limit, and with one-line reasons for errors."""

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, TiffImagePlugin, UnidentifiedImageError

_lock = threading.RLock()

# Brands in the first box of a HEIC file, a format that Pillow does not know.
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


class BadImageError(ValueError):
    """The image cannot be used; the message is the reason."""


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off Pillow's warnings and its pixel limit: data.max_pixels is the only limit."""
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def opened(content: bytes | memoryview) -> Image.Image:
    """The image, with only its header read. Raises BadImageError."""
    try:
        with quiet():
            return Image.open(io.BytesIO(content))
    except UnidentifiedImageError as error:
        if content[4:8] == b"ftyp" and bytes(content[8:12]) in _HEIC:
            raise BadImageError("HEIC is not decoded; save it as JPEG or AVIF") from error
        if bytes(content[:4]) in TiffImagePlugin.PREFIXES:
            raise BadImageError("a kind of TIFF that is not decoded, or truncated") from error
        raise BadImageError("no image in a known format, or truncated") from error
    except Exception as error:  # Pillow may raise anything for broken bytes.
        raise BadImageError(f"its header is broken ({reason_of(error)})") from error


def reason_of(error: Exception) -> str:
    """The message of an exception in one line."""
    message = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
