"""Read an encoded image's size, orientation and completeness without decoding it."""

from typing import Any, NamedTuple

from PIL import ExifTags, Image, TiffImagePlugin, TiffTags

from pipelines.images.orientation import (
    SIDEWAYS,
    UPRIGHT,
    orientation_in,
    orientation_in_png,
    orientation_of,
    tells_orientation,
)
from pipelines.images.pillow import BadImageError, opened, quiet, reason_of

# DALI decodes most kinds of the first five; Pillow decodes the rest.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM")

# JPEG markers (ITU-T T.81, table B.1): frame headers are C0 to CF except three; _ALONE have no segment.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ALONE = frozenset([0x01, *range(0xD0, 0xD8)])
_APP1, _APP14, _SCAN, _FILL = 0xE1, 0xEE, 0xDA, 0xFF
_EXIF, _XMP, _ADOBE = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"Adobe"
_ADOBE_LENGTH = 14
_PNG = b"\x89PNG\r\n\x1a\n"
# Flags of a WebP's VP8X chunk.
_HAS_EXIF, _HAS_XMP, _ANIMATED = 8, 4, 2

# TIFF tags of the offsets and sizes of strips and of tiles (Pillow has no names for the latter).
_PIXELS = ((TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.STRIPBYTECOUNTS), (324, 325))

# The kinds of TIFF that DALI decodes like Pillow, measured by tests/pipelines/test_pixels.py: bits of each
# sample, photometric interpretation and meaning of a fourth sample, for _TIFF_COMPRESSIONS.
_TIFF_KINDS = {
    *(((bits,), photo, ()) for bits in (8, 16) for photo in (0, 1)),
    ((8,), 3, ()),
    *(((bits,) * 3, 2, ()) for bits in (8, 16)),
    *(((bits,) * 4, 2, extra) for bits in (8, 16) for extra in ((), (0,), (2,))),
    ((8,) * 4, 5, ()),
}
# Kinds with a separate plane for each sample that Pillow decodes correctly; DALI decodes few of them.
_TIFF_PLANAR_KINDS = {
    *(((bits,) * 3, 2, ()) for bits in (8, 16)),
    *(((bits,) * 4, 2, (extra,)) for bits in (8, 16) for extra in (0, 1, 2)),
    *(((bits,) * 4, 5, ()) for bits in (8, 16)),
    *(((8, 8), 1, (extra,)) for extra in (0, 2)),
}
_TIFF_COMPRESSIONS = (1, 5, 7, 8, 32773, 32946, 50000)
_TIFF_JPEG, _TIFF_YCBCR, _TIFF_PALETTE = 7, 6, 3
_FILL_ORDER, _TILE_WIDTH, _INK_SET = 266, 322, 332
_BMP_RAW, _BMP_BITS, _BMP_HEADERS = 0, (1, 4, 8, 24, 32), (12, 40, 108, 124)


class Header(NamedTuple):
    """Height and width of an image as shown, and the EXIF orientation in which it is stored.

    for_pillow: whether Pillow must decode it (pipelines.images.conversion), because DALI cannot or is wrong.
    """

    height: int
    width: int
    orientation: int = UPRIGHT
    for_pillow: bool = False

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width of the decoded pixels."""
        return (self.width, self.height) if self.orientation in SIDEWAYS else (self.height, self.width)

    @property
    def upright(self) -> "Header":
        """The header of the same image, saved upright."""
        return Header(self.height, self.width)


def read_header(content: bytes | memoryview | None, *, max_pixels: int) -> Header:
    """Read the header of an image.

    Raises BadImageError, and nothing else, if the content is not an image, is truncated, is in a format that
    is not decoded, or has more than max_pixels pixels.
    """
    if not content:
        raise BadImageError("no bytes")
    try:
        header = _read(content)
    except BadImageError:
        raise
    except Exception as error:  # Pillow and struct may raise anything for broken bytes.
        raise BadImageError(f"its header is broken ({reason_of(error)})") from error
    if header.height < 1 or header.width < 1:
        raise BadImageError(f"{header.width} x {header.height} pixels")
    if header.height * header.width > max_pixels:
        raise BadImageError(
            f"{header.width} x {header.height} pixels, more than data.max_pixels={max_pixels}"
        )
    return header


def image_format(content: bytes | memoryview) -> str:
    """PIL's name of the image's format, or "unknown"."""
    try:
        return opened(content).format or "unknown"
    except BadImageError:
        return "unknown"


def _read(content: bytes | memoryview) -> Header:
    if content[:2] == b"\xff\xd8":
        return _jpeg(content)
    if content[:8] == _PNG:
        return _png(content)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return _webp(content)
    image = opened(content)
    if image.format not in FORMATS:
        raise BadImageError(f"{image.format} is not decoded; {', '.join(FORMATS)} are")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        with quiet():
            return _tiff(image, content)
    return _bmp(image, content) if image.format == "BMP" else _by_pillow(image)


def _jpeg(content: bytes | memoryview) -> Header:
    at, size, colours, adobe, end = 2, None, 0, False, len(content) - 9
    metadata: dict[Any, bytes] = {}
    while True:
        if at > end:
            raise BadImageError("truncated JPEG")
        marker = content[at + 1]
        if content[at] != _FILL or not marker:
            return _by_pillow(opened(content))  # Pillow skips bytes between two markers; DALI does not.
        if marker == _SCAN:
            break
        if marker in _ALONE:
            return _by_pillow(opened(content))  # As above.
        if marker == _FILL:
            at += 1
            continue
        # Index single bytes: slices would take half of the time for a small image's header.
        length = content[at + 2] << 8 | content[at + 3]
        if marker in _FRAMES:
            height = content[at + 5] << 8 | content[at + 6]
            size, colours = (height, content[at + 7] << 8 | content[at + 8]), content[at + 9]
            if (bits := content[at + 4]) != 8 or colours not in (1, 3, 4):
                raise BadImageError(f"a JPEG of {colours} colours of {bits} bits is not decoded")
        elif marker == _APP1:
            _note(metadata, bytes(content[at + 4 : at + 2 + length]))
        elif marker == _APP14:
            adobe = adobe or (length >= _ADOBE_LENGTH and content[at + 4 : at + 9] == _ADOBE)
        at += 2 + length
    # Padding or another picture may follow the end marker; search after `at`, as a thumbnail has one too.
    if content[-2:] != b"\xff\xd9" and b"\xff\xd9" not in bytes(content[at:]):
        raise BadImageError("truncated JPEG")
    if size is None:
        raise BadImageError("broken JPEG: no frame header")
    # DALI treats every JPEG of four colours as inverted, but only Adobe's are.
    for_pillow = colours == 4 and not adobe
    return _turned(*size, orientation_in(metadata), for_pillow=for_pillow)


def _note(metadata: dict[Any, bytes], segment: bytes) -> None:
    """Keep the metadata in a JPEG segment as Pillow does; EXIF data may span several segments."""
    if segment.startswith(_EXIF):
        metadata["exif"] = metadata["exif"] + segment[len(_EXIF) :] if "exif" in metadata else segment
    elif segment.startswith(_XMP):
        metadata["xmp"] = segment[len(_XMP) :]


def _png(content: bytes | memoryview) -> Header:
    if content[12:16] != b"IHDR":
        raise BadImageError("a PNG that does not begin with its size, like those of iPhones; save it again")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    at, chunks, pixels, animated = 8, [], False, False
    while (kind := bytes(content[at + 4 : at + 8])) != b"IEND":
        length = int.from_bytes(content[at : at + 4], "big")
        if not kind:
            # The end chunk may still be there after the pixels, hidden by a broken chunk.
            if not pixels or b"IEND" not in bytes(content[8:]):
                raise BadImageError("truncated PNG")
            break
        pixels |= kind == b"IDAT"
        animated |= kind == b"acTL"
        if tells_orientation(kind, bytes(content[at + 8 : at + 8 + min(length, 32)])):
            chunks.append((kind, bytes(content[at + 8 : at + 8 + length])))
        at += 12 + length
    if not pixels:
        raise BadImageError("broken PNG: no pixels")
    # DALI does not show the first picture of an animated PNG.
    return _turned(height, width, orientation_in_png(chunks), for_pillow=animated)


def _webp(content: bytes | memoryview) -> Header:
    end = 8 + int.from_bytes(content[4:8], "little")
    _whole(end, content, "WEBP")
    at, size, flags, metadata, padded = 12, None, 0, {}, False
    while at + 8 <= end:
        kind, length = bytes(content[at : at + 4]), int.from_bytes(content[at + 4 : at + 8], "little")
        data = content[at + 8 : at + 8 + length]
        if kind == b"VP8X":
            flags = data[0]
            size = tuple(1 + int.from_bytes(data[start : start + 3], "little") for start in (4, 7))
        elif kind == b"VP8 " and size is None:
            size = tuple(int.from_bytes(data[start : start + 2], "little") & 0x3FFF for start in (6, 8))
        elif kind == b"VP8L" and size is None:
            bits = int.from_bytes(data[1:5], "little")
            size = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        elif kind == b"EXIF" and flags & _HAS_EXIF:
            metadata.setdefault("exif", bytes(data))
        elif kind == b"XMP " and flags & _HAS_XMP:
            metadata.setdefault("xmp", bytes(data))
        padded |= length % 2 and kind != b"EXIF"
        at += 8 + length + length % 2
    if size is None:
        raise BadImageError("broken WEBP: no frame header")
    # DALI misses EXIF data after a chunk of odd length: it ignores the padding byte.
    for_pillow = bool(flags & _ANIMATED or (flags & _HAS_EXIF and padded))
    return _turned(size[1], size[0], orientation_in(metadata), for_pillow=for_pillow)


def _tiff(image: TiffImagePlugin.TiffImageFile, content: bytes | memoryview) -> Header:
    tags = image.tag_v2
    ends = [
        offset + size
        for offsets, sizes in _PIXELS
        for offset, size in zip(tags.get(offsets, ()), tags.get(sizes, ()), strict=False)
    ]
    if max(ends, default=0) > len(content):
        raise BadImageError("truncated TIFF")
    width, height = tags[TiffImagePlugin.IMAGEWIDTH], tags[TiffImagePlugin.IMAGELENGTH]
    if set(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))) != {1}:
        raise BadImageError(
            "its samples are signed or floating-point numbers of unknown range; "
            "save it with 8 or 16 bits a sample"
        )
    # DALI turns some kinds whatever adjust_orientation says, and fails on others.
    told = ExifTags.Base.Orientation in _tags(content)
    upright = not told or tags.get(ExifTags.Base.Orientation) == UPRIGHT
    orientation, plain = orientation_of(image), _is_plain_tiff(tags)
    return _turned(height, width, orientation, for_pillow=not (plain and upright and orientation == UPRIGHT))


def _tags(content: bytes | memoryview) -> set[int]:
    """The tags of a TIFF's first picture, including those without a value, which Pillow skips."""
    order = "little" if content[:2] == b"II" else "big"
    start = int.from_bytes(content[4:8], order)
    entries = (start + 2 + 12 * n for n in range(int.from_bytes(content[start : start + 2], order)))
    return {int.from_bytes(content[at : at + 2], order) for at in entries}


def _is_plain_tiff(tags: Any) -> bool:
    """Whether DALI decodes the TIFF correctly. Raises BadImageError if Pillow does not either."""
    samples = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
    bits = bits * samples if len(bits) == 1 else bits
    photo = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION)
    kind = bits, photo, tags.get(TiffImagePlugin.EXTRASAMPLES, ())
    if samples > 1 and tags.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1) != 1:
        if kind not in _TIFF_PLANAR_KINDS:
            raise BadImageError(
                "its samples lie in separate planes, which is not decoded; save it with one plane"
            )
        return False
    compression = tags.get(TiffImagePlugin.COMPRESSION, 1)
    if tags.tagtype.get(ExifTags.Base.Orientation) not in (None, TiffTags.SHORT, TiffTags.LONG):
        return False
    if tags.get(_FILL_ORDER, 1) != 1 or tags.get(_INK_SET, 1) != 1 or (_TILE_WIDTH in tags and not photo):
        return False
    if photo == _TIFF_PALETTE and len(tags.get(TiffImagePlugin.COLORMAP, ())) != 3 << bits[0]:
        return False
    if photo == _TIFF_YCBCR:
        return compression == _TIFF_JPEG and bits == (8,) * 3
    return compression in _TIFF_COMPRESSIONS and len(bits) == samples and kind in _TIFF_KINDS


def _bmp(image: Image.Image, content: bytes | memoryview) -> Header:
    header = int.from_bytes(content[14:18], "little")
    bits = int.from_bytes(content[24:26] if header == 12 else content[28:30], "little")
    start = int.from_bytes(content[10:14], "little")
    # DALI fails on 16 bits per pixel, run lengths and masks, and when the pixels start within the palette.
    is_plain = header in _BMP_HEADERS and bits in _BMP_BITS and image.info.get("compression") == _BMP_RAW
    if not is_plain or start < 14 + header or (bits <= 8 and not _has_palette(content, header, bits, start)):
        return _by_pillow(image)
    row = (image.width * bits + 31) // 32 * 4
    _whole(start + row * image.height, content, "BMP")
    return Header(image.height, image.width)


def _has_palette(content: bytes | memoryview, header: int, bits: int, start: int) -> bool:
    """Whether the palette between a BMP's header and its pixels has as many colours as the header says."""
    used = int.from_bytes(content[46:50], "little") if header > _BMP_HEADERS[0] else 0
    colours = (start - 14 - header) // (4 if header > _BMP_HEADERS[0] else 3)
    return colours == (used or 1 << bits) <= 1 << bits


def _whole(end: int, content: bytes | memoryview, kind: str) -> None:
    if end > len(content):
        raise BadImageError(f"truncated {kind}")


def _by_pillow(image: Image.Image) -> Header:
    return _turned(image.height, image.width, orientation_of(image), for_pillow=True)


def _turned(height: int, width: int, orientation: int, *, for_pillow: bool = False) -> Header:
    """The header of an image that is stored with this height and width."""
    if orientation in SIDEWAYS:
        height, width = width, height
    return Header(height, width, orientation, for_pillow)
