"""What an encoded image says of itself: its shown size, and whether it is whole, without decoding it."""

import io
import warnings

from PIL import Image

# What DALI decodes on every device.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")

_ORIENTATION = 0x0112
_SIDEWAYS = range(5, 9)

# JPEG markers (ITU-T T.81, table B.1): frame headers are C0 to CF but for three; these stand alone.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ALONE = frozenset([0x01, *range(0xD0, 0xD8)])
_APP1, _SCAN, _FILL = 0xE1, 0xDA, 0xFF
_EXIF = b"Exif\0\0"
_PNG = b"\x89PNG\r\n\x1a\n"

_STRIP_OFFSETS, _STRIP_SIZES = 273, 279


class BadImageError(ValueError):
    """The image cannot be used; the message is the reason."""


def shown_size(content: bytes | memoryview | None, *, max_pixels: int) -> tuple[int, int]:
    """Height and width of the image as it is shown, turned as its EXIF data say.

    Raises BadImageError for what is no image, not whole, in a format that is not decoded, or has more than
    max_pixels pixels.
    """
    if not content:
        raise BadImageError("no bytes")
    try:
        if content[:2] == b"\xff\xd8":
            height, width = _jpeg(content)
        elif content[:8] == _PNG:
            height, width = _png(content)
        else:
            height, width = _other(content)
    except (IndexError, OSError, SyntaxError, KeyError, TypeError) as error:
        raise BadImageError("its header is broken") from error
    if height < 1 or width < 1:
        raise BadImageError(f"{width} x {height} pixels")
    if height * width > max_pixels:
        raise BadImageError(f"{width} x {height} pixels, more than data.max_pixels={max_pixels}")
    return height, width


def image_format(content: bytes | memoryview) -> str:
    """The format's name, as PIL's, or "unknown"."""
    try:
        return _opened(content).format or "unknown"
    except BadImageError:
        return "unknown"


def _jpeg(content: bytes | memoryview) -> tuple[int, int]:
    at, size, orientation, end = 2, None, 1, len(content) - 9
    while True:
        if at > end:
            raise BadImageError("truncated JPEG")
        if content[at] != _FILL:
            raise BadImageError(f"broken JPEG: no marker at byte {at}")
        marker = content[at + 1]
        if marker == _SCAN:
            break
        if marker == _FILL or marker in _ALONE:
            at += 1 if marker == _FILL else 2
            continue
        # Bytes one by one: slices would take half of the time of a small image's header.
        length = content[at + 2] << 8 | content[at + 3]
        if marker in _FRAMES:
            height = content[at + 5] << 8 | content[at + 6]
            size = height, content[at + 7] << 8 | content[at + 8]
        elif marker == _APP1 and content[at + 4 : at + 10] == _EXIF:
            orientation = _orientation(bytes(content[at + 4 : at + 2 + length]))
        at += 2 + length
    # The end may be followed by padding or another picture, and a thumbnail has an end of its own.
    if content[-2:] != b"\xff\xd9" and b"\xff\xd9" not in bytes(content[at:]):
        raise BadImageError("truncated JPEG")
    if size is None:
        raise BadImageError("broken JPEG: no frame header")
    return _turned(size[0], size[1], orientation)


def _png(content: bytes | memoryview) -> tuple[int, int]:
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    at, orientation = 8, 1
    while (kind := content[at + 4 : at + 8]) != b"IDAT":
        length = int.from_bytes(content[at : at + 4], "big")
        if not kind:
            raise BadImageError("truncated PNG")
        if kind == b"eXIf":
            orientation = _orientation(_EXIF + bytes(content[at + 8 : at + 8 + length]))
        at += 12 + length
    if content[-8:-4] != b"IEND" and b"IEND" not in bytes(content[at:]):
        raise BadImageError("truncated PNG")
    return _turned(height, width, orientation)


def _other(content: bytes | memoryview) -> tuple[int, int]:
    image = _opened(content)
    if image.format not in FORMATS:
        raise BadImageError(f"{image.format} is not decoded; {', '.join(FORMATS)} are")
    end = len(content)
    if image.format == "WEBP":
        end = 8 + int.from_bytes(content[4:8], "little")
    elif image.format == "BMP":
        end = int.from_bytes(content[2:6], "little")
    elif image.format == "TIFF":
        end = _tiff_end(image)
    if end > len(content):
        raise BadImageError(f"truncated {image.format}")
    return _turned(image.height, image.width, image.getexif().get(_ORIENTATION, 1))


def _opened(content: bytes | memoryview) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of large images, which are judged by max_pixels.
            return Image.open(io.BytesIO(content))
    except Image.DecompressionBombError as error:
        raise BadImageError("more pixels than can be decoded safely") from error
    except (OSError, SyntaxError, ValueError, TypeError) as error:
        raise BadImageError("no image in a known format, or truncated") from error


def _tiff_end(image: Image.Image) -> int:
    tags = getattr(image, "tag_v2", {})
    offsets, sizes = tags.get(_STRIP_OFFSETS, ()), tags.get(_STRIP_SIZES, ())
    return max((offset + size for offset, size in zip(offsets, sizes, strict=False)), default=0)


def _orientation(exif: bytes) -> int:
    data = Image.Exif()
    try:
        data.load(exif)
    except (OSError, SyntaxError, ValueError, TypeError):
        return 1  # A decoder that cannot read it shows the image as it is stored.
    return data.get(_ORIENTATION, 1)


def _turned(height: int, width: int, orientation: int) -> tuple[int, int]:
    return (width, height) if orientation in _SIDEWAYS else (height, width)
