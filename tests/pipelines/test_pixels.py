"""Every kind of image decodes to Pillow's pixels within three levels, or gives a reason why not."""

import io
import itertools
import struct
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from tiffs import SHORT, Tags, tiff

from pipelines.augment.dali import undecodable
from pipelines.augment.dali_graph import build_decoder
from pipelines.images.conversion import to_png
from pipelines.images.header import read_header
from pipelines.images.pillow import BadImageError

_HEIGHT, _WIDTH = 37, 53
_Y, _X = np.mgrid[:_HEIGHT, :_WIDTH]
_SMOOTH = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)).resize(
    (_WIDTH, _HEIGHT), Image.Resampling.BICUBIC
)
_WHITE, _BLACK, _RGB, _PALETTE, _CMYK, _YCBCR, _LAB = 0, 1, 2, 3, 5, 6, 8


def _samples(count: int, bits: int) -> np.ndarray:
    """Height x width x count, each of them different, from 0 to the most that the bits hold."""
    most = (1 << bits) - 1
    ramps = [
        _X * most // _WIDTH, _Y * most // _HEIGHT, (7 * _X + 3 * _Y) % (most + 1),
        (_X + _Y) * most // (_WIDTH + _HEIGHT), (_X + _Y) % (most + 1),
    ]  # fmt: skip
    return np.stack(ramps[:count], axis=-1)


def _packed(rows: np.ndarray, bits: int, order: str) -> bytes:
    """Rows of samples as bytes; each row begins a new one."""
    flat = rows.reshape(len(rows), -1)
    if bits >= 8:
        return flat.astype(f"{order}u{bits // 8}").tobytes() if bits % 8 == 0 else _twelve(flat)
    ones = np.unpackbits(flat.astype(np.uint8)[..., None], axis=2)[..., -bits:]
    return np.packbits(ones.reshape(len(flat), -1), axis=1).tobytes()


def _twelve(rows: np.ndarray) -> bytes:
    ones = np.unpackbits(rows.astype(">u2").view(np.uint8).reshape(len(rows), -1, 2), axis=2)[..., 4:]
    return np.packbits(ones.reshape(len(rows), -1), axis=1).tobytes()


def _made_tiff(bits: int, photo: int, count: int, extra: int | None, planar: int, order: str) -> bytes:
    tags: Tags = {
        256: (SHORT, [_WIDTH]), 257: (SHORT, [_HEIGHT]), 258: (SHORT, [bits] * count), 259: (SHORT, [1]),
        262: (SHORT, [photo]), 277: (SHORT, [count]), 278: (SHORT, [_HEIGHT]), 284: (SHORT, [planar]),
    }  # fmt: skip
    if extra is not None:
        tags[338] = (SHORT, [extra] + [0] * (count - {_RGB: 3}.get(photo, 1) - 1))
    if photo == _PALETTE:
        colours = np.random.default_rng(3).integers(0, 256, 3 << bits)
        tags[320] = (SHORT, (257 * colours).tolist())
    if photo == _YCBCR:
        tags[530] = (SHORT, [1, 1])
    samples = _samples(count, bits)
    planes = np.moveaxis(samples, -1, 0) if planar == 2 else [samples]
    return tiff(tags, [_packed(plane, bits, order) for plane in planes], order)


_LAYOUTS = [
    (_WHITE, 1, None), (_BLACK, 1, None), (_PALETTE, 1, None), (_RGB, 3, None), (_BLACK, 2, 0),
    (_BLACK, 2, 1), (_BLACK, 2, 2), (_RGB, 4, None), (_RGB, 4, 0), (_RGB, 4, 1), (_RGB, 4, 2),
    (_RGB, 5, 0), (_CMYK, 4, None), (_YCBCR, 3, None), (_LAB, 3, None), (_PALETTE, 2, 2),
]  # fmt: skip


def _tiffs() -> Iterator[tuple[str, bytes]]:
    for bits, (photo, count, extra), order in itertools.product((1, 2, 4, 8, 12, 16, 32), _LAYOUTS, "<>"):
        if photo != _PALETTE or bits <= 8:
            name = f"{bits} bits, photometric {photo}, {count} samples, extra {extra}, {order}"
            yield name, _made_tiff(bits, photo, count, extra, 1, order)
    pictures = {
        "RGB": _SMOOTH, "L": _SMOOTH.convert("L"), "P": _SMOOTH.quantize(64), "1": _SMOOTH.convert("1"),
        "LA": _SMOOTH.convert("LA"), "RGBA": _SMOOTH.convert("RGBA"), "CMYK": _SMOOTH.convert("CMYK"),
        "YCbCr": _SMOOTH.convert("YCbCr"), "I;16": Image.fromarray((1200 * _X + 7 * _Y).astype(np.uint16)),
        "F": Image.fromarray((_X / _WIDTH).astype(np.float32)), "I": Image.fromarray(_X.astype(np.int32)),
    }  # fmt: skip
    for mode, image in pictures.items():
        for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma"):
            yield f"{mode}, {compression}", _saved(image, "TIFF", compression=compression)
    for mode in ("RGB", "L", "CMYK", "YCbCr"):
        yield f"{mode}, jpeg", _saved(pictures[mode], "TIFF", compression="jpeg", quality=95)
    for compression in ("group3", "group4"):
        yield compression, _saved(pictures["1"], "TIFF", compression=compression)
    yield "BigTIFF", _saved(_SMOOTH, "TIFF", big_tiff=True)


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _adobe(jpeg: bytes, transform: int | None) -> bytes:
    """The JPEG with another colour transform in Adobe's marker, or without the marker."""
    at = jpeg.index(b"\xff\xee")
    length = 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    kept = b"" if transform is None else jpeg[at : at + 15] + bytes([transform])
    return jpeg[:at] + kept + jpeg[at + length :]


def _jpegs() -> Iterator[tuple[str, bytes]]:
    cmyk = _saved(_SMOOTH.convert("CMYK"), "JPEG", quality=95)
    rgb = _saved(_SMOOTH, "JPEG", quality=95, keep_rgb=True)
    plain = _saved(_SMOOTH, "JPEG", quality=95)
    yield from {"CMYK": cmyk, "no Adobe CMYK": _adobe(cmyk, None), "YCCK": _adobe(cmyk, 2)}.items()
    yield from {"RGB": rgb, "no Adobe RGB": _adobe(rgb, None), "YCbCr": plain}.items()
    yield "grey", _saved(_SMOOTH.convert("L"), "JPEG", quality=95)
    yield "progressive", _saved(_SMOOTH, "JPEG", quality=95, progressive=True)
    yield "junk between markers", plain[:20] + b"junk" + plain[20:]


def _made_png(colours: int, depth: int, count: int, *chunks: tuple[bytes, bytes]) -> bytes:
    rows = _packed(_samples(count, depth), depth, ">")
    size = len(rows) // _HEIGHT
    pixels = b"".join(b"\0" + rows[at : at + size] for at in range(0, len(rows), size))
    head = struct.pack(">IIBBBBB", _WIDTH, _HEIGHT, depth, colours, 0, 0, 0)
    whole = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in whole
    )


def _pngs() -> Iterator[tuple[str, bytes]]:
    colours = np.random.default_rng(1).integers(0, 256, 768, np.uint8).tobytes()
    for depth in (1, 2, 4, 8, 16):
        yield f"grey, {depth} bits", _made_png(0, depth, 1)
        yield f"grey and a clear one, {depth} bits", _made_png(0, depth, 1, (b"tRNS", b"\0\1"))
        if depth <= 8:
            palette = (b"PLTE", colours[: 3 << depth])
            yield f"palette, {depth} bits", _made_png(3, depth, 1, palette)
            clear = (b"tRNS", bytes(range(min(256, 1 << depth))))
            yield f"palette with alpha, {depth} bits", _made_png(3, depth, 1, palette, clear)
        if depth >= 8:
            for name, kind, count in (("RGB", 2, 3), ("grey and alpha", 4, 2), ("RGBA", 6, 4)):
                yield f"{name}, {depth} bits", _made_png(kind, depth, count)
    frames = [Image.new("RGBA", (64, 48), colour) for colour in ("red", "green", "blue")]
    yield "animated", _saved(frames[0], "PNG", save_all=True, append_images=frames[1:])
    yield (
        "animated, the first one apart",
        _saved(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True),
    )


def _made_bmp(bits: int, rows: bytes, compression: int = 0, masks: bytes = b"", header: int = 40) -> bytes:
    info = struct.pack(
        "<IiiHHIIiiII", header, _WIDTH, _HEIGHT, 1, bits, compression, len(rows), 0, 0, 0, 0
    ) + masks[: header - 40].ljust(header - 40, b"\0")
    rest = masks[header - 40 :] if header == 40 else b""
    if bits <= 8:
        rest += np.random.default_rng(2).integers(0, 256, 4 << bits, np.uint8).tobytes()
    offset = 14 + len(info) + len(rest)
    return struct.pack("<2sIHHI", b"BM", offset + len(rows), 0, 0, offset) + info + rest + rows


def _bmps() -> Iterator[tuple[str, bytes]]:
    rgb = _samples(3, 8).astype(np.uint8)
    padded = np.pad(rgb[..., ::-1], [(0, 0), (0, 0), (0, 1)])
    yield "24 bits", _saved(_SMOOTH, "BMP")
    yield "32 bits", _made_bmp(32, padded.tobytes())
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    for header in (40, 52, 56, 108, 124):
        yield f"32 bits by masks, header {header}", _made_bmp(32, padded.tobytes(), 3, masks, header)
    red, green, blue = (rgb[..., n].astype(np.uint16) for n in range(3))
    for name, sixteen, compression, greens in (
        ("15 bits", red >> 3 << 10 | green >> 3 << 5 | blue >> 3, 0, 0),
        ("16 bits by masks", red >> 3 << 11 | green >> 2 << 5 | blue >> 3, 3, 0x7E0),
    ):
        masks = struct.pack("<III", 0xF800, greens, 0x1F) if compression else b""
        rows = np.pad(sixteen, [(0, 0), (0, 1)]).astype("<u2").tobytes()
        yield name, _made_bmp(16, rows, compression, masks)
    for bits in (1, 4, 8):
        rows = _packed(_samples(1, bits), bits, "<")
        size = len(rows) // _HEIGHT
        padded_rows = b"".join(
            rows[at : at + size].ljust(-(-size // 4) * 4, b"\0") for at in range(0, len(rows), size)
        )
        yield f"palette, {bits} bits", _made_bmp(bits, padded_rows)
    runs = b"".join(b"".join(bytes([1, value]) for value in row) + b"\0\0" for row in _samples(1, 8)[..., 0])
    yield "runs", _made_bmp(8, runs + b"\0\1", 1)


def _others() -> Iterator[tuple[str, bytes]]:
    alpha = _SMOOTH.convert("RGBA")
    alpha.putalpha(Image.fromarray((255 * _X // _WIDTH).astype(np.uint8)))
    yield "WebP", _saved(_SMOOTH, "WEBP", quality=95)
    yield "lossless WebP", _saved(_SMOOTH, "WEBP", lossless=True)
    yield "WebP with alpha", _saved(alpha, "WEBP", lossless=True, exact=True)
    yield "animated WebP", _saved(_SMOOTH, "WEBP", save_all=True, append_images=[alpha], lossless=True)
    yield "GIF", _saved(_SMOOTH, "GIF")
    yield "animated GIF", _saved(_SMOOTH, "GIF", save_all=True, append_images=[alpha])
    yield "AVIF", _saved(_SMOOTH, "AVIF", quality=95)
    yield "AVIF with alpha", _saved(alpha, "AVIF", quality=95)
    yield "JPEG 2000", _saved(_SMOOTH, "JPEG2000")
    yield "PPM", _saved(_SMOOTH, "PPM")
    yield "PGM", _saved(_SMOOTH.convert("L"), "PPM")
    yield "PBM", _saved(_SMOOTH.convert("1"), "PPM")


_ALL = {"TIFF": _tiffs, "JPEG": _jpegs, "PNG": _pngs, "BMP": _bmps, "other": _others}


def _pillows(content: bytes) -> np.ndarray | None:
    """The picture as Pillow shows it, with the high byte of 16 bits. None if it cannot be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content))
            image.load()
            return _in_eight_bits(image)
    except Exception:
        return None


def _in_eight_bits(image: Image.Image) -> np.ndarray | None:
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]
        grey = (np.asarray(image).astype(int) >> bits - 8).astype(np.uint8)
        return np.stack([grey] * 3, axis=-1)
    if image.mode in ("I", "F"):
        return None
    straight = image.convert(image.mode.upper()) if image.mode in ("La", "RGBa") else image
    return np.asarray(straight.convert("RGB"))


@pytest.fixture(scope="module")
def decoder():
    """DALI's, as training has it."""
    return build_decoder(gpu=None)


def _ours(content: bytes, decoder) -> np.ndarray | str:
    """The picture as training sees it, or the reason why it is bad."""
    try:
        header = read_header(content, max_pixels=10_000)
        if header.for_pillow:
            content = to_png(content, header)
    except BadImageError as bad:
        return str(bad)
    image = np.frombuffer(content, np.uint8)
    if reasons := undecodable([image], np.array([header.stored_size])):
        return reasons[0]
    (decoded,) = decoder.run(image=[image])
    return np.asarray(decoded[0])


@pytest.mark.parametrize("kind", _ALL)
def test_pixels_are_pillows_or_there_is_a_reason(kind: str, decoder):
    read, wrong = [], []
    for name, content in _ALL[kind]():
        ours, expected = _ours(content, decoder), _pillows(content)
        if isinstance(ours, str):
            assert expected is None, (name, ours)
            continue
        read.append(name)
        if expected is None or np.abs(ours.astype(int) - expected).max() > 3:
            wrong.append(name)
    assert not wrong
    assert len(read) >= {"TIFF": 100, "JPEG": 9, "PNG": 24, "BMP": 10, "other": 12}[kind]


@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiffs_samples_are_those_that_were_written_in_planes_of_their_own_too(
    bits: int, planar: int, decoder
):
    read = 0
    for (photo, count, extra), order in itertools.product(_LAYOUTS, "<>"):
        # Colours by a palette, another space or made darker by alpha are Pillow's alone to tell.
        if photo in (_PALETTE, _CMYK, _YCBCR, _LAB) or extra == 1:
            continue
        made = _ours(_made_tiff(bits, photo, count, extra, planar, order), decoder)
        if isinstance(made, str):
            assert "is not decoded" in made
            continue
        samples = _samples(count, bits) >> (bits - 8)
        if photo == _WHITE and bits == 8:
            samples = 255 - samples
        np.testing.assert_allclose(
            made, np.broadcast_to(samples[..., : 3 if photo == _RGB else 1], made.shape), atol=1
        )
        read += 1
    assert read >= 8


def test_a_12_bit_tiff_shows_the_highest_8_bits(decoder):
    made = _ours(_made_tiff(12, _BLACK, 1, None, 1, "<"), decoder)
    np.testing.assert_array_equal(made, np.repeat(_samples(1, 12) >> 4, 3, axis=-1))


def test_samples_whose_range_nothing_tells_are_named(decoder):
    for mode in ("float32", "int32", "int16"):
        reason = _ours(_saved(Image.fromarray(_X.astype(mode)), "TIFF"), decoder)
        assert "save it with 8 or 16 bits a sample" in str(reason)


def test_as_many_pixels_as_max_pixels_allows_are_taken_in_any_format(monkeypatch: pytest.MonkeyPatch):
    # Pillow refuses twice as many as this by itself.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM"):
        content = _saved(_SMOOTH, kind)
        header = read_header(content, max_pixels=_HEIGHT * _WIDTH)
        assert header[:2] == (_HEIGHT, _WIDTH)
        assert read_header(to_png(content, header), max_pixels=_HEIGHT * _WIDTH) == header.upright
        with pytest.raises(BadImageError, match=r"53 x 37 pixels, more than data\.max_pixels=1960"):
            read_header(content, max_pixels=_HEIGHT * _WIDTH - 1)
    assert Image.MAX_IMAGE_PIXELS == 100
