"""An image stored turned or mirrored, in any encoding, has the same views as when saved upright."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin
from tiffs import BYTE, LONG, SHORT, tiff

from pipelines.augment.dali import Request, make_views
from pipelines.augment.dali_graph import build_crops
from pipelines.batches import Rows
from pipelines.config import DataConfig, ViewRecipe
from pipelines.feed import make_request
from pipelines.images.header import read_header
from pipelines.index import build_index
from pipelines.plan import Piece
from pipelines.reader import Reading, read_pieces

_DATA = DataConfig(train="")
_ORIENTATION, _XMP_TAG, _RATIONAL = 0x0112, 700, 5
_LETTERS = {BYTE: "B", SHORT: "H", LONG: "I"}
_PREFIX = b"Exif\0\0"
_TILT = ViewRecipe(
    size=32, rotate=0.7, rotate_degrees=(-30, 30), jitter=0, brightness=0, contrast=0, saturation=0, hue=0,
    grey=0, blur=0,
)  # fmt: skip
_TURN = ViewRecipe(
    size=24, rotate=0.7, jitter=0, brightness=0, contrast=0, saturation=0, hue=0, grey=0, blur=0
)


def _exif(orientation: int, kind: int = SHORT, order: str = ">", count: int = 1) -> bytes:
    """EXIF data of one tag."""
    if kind == _RATIONAL:
        value, beside = struct.pack(order + "I", 26), struct.pack(order + "II", orientation, 1)
    else:
        value, beside = struct.pack(order + _LETTERS[kind], orientation).ljust(4, b"\0"), b""
    head = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(order + "I", 8)
    entry = struct.pack(order + "HHHI", 1, _ORIENTATION, kind, count)
    return head + entry + value + bytes(4) + beside


def _xmp(orientation: int, *, element: bool = False) -> bytes:
    told = f"><tiff:Orientation>{orientation}</tiff:Orientation></rdf:Description>"
    if not element:
        told = f' tiff:Orientation="{orientation}"/>'
    return f"<x:xmpmeta><rdf:RDF><rdf:Description{told}</rdf:RDF></x:xmpmeta>".encode()


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _jpeg(image: Image.Image, *segments: bytes) -> bytes:
    plain = _saved(image, "JPEG", quality=95)
    told = b"".join(b"\xff\xe1" + struct.pack(">H", 2 + len(segment)) + segment for segment in segments)
    return plain[:2] + told + plain[2:]


def _png(image: Image.Image, kind: bytes, data: bytes, *, last: bool = False) -> bytes:
    plain = _saved(image, "PNG")
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    at = plain.index(b"IEND" if last else b"IDAT") - 4
    return plain[:at] + chunk + plain[at:]


def _png_text(image: Image.Image, key: str, text: str, *, packed: bool) -> bytes:
    texts = PngImagePlugin.PngInfo()
    if "xmp" in key:
        texts.add_itxt(key, text, zip=packed)
    else:
        texts.add_text(key, text, zip=packed)
    return _saved(image, "PNG", pnginfo=texts)


def _webp(image: Image.Image, kind: bytes, data: bytes, flag: int) -> bytes:
    plain = _saved(image, "WEBP", lossless=True)[12:]
    size = b"".join((side - 1).to_bytes(3, "little") for side in image.size)
    chunks = b"VP8X" + struct.pack("<I", 10) + bytes([flag, 0, 0, 0]) + size + plain
    chunks += kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def _tiff(image: Image.Image, tag: int, kind: int, values: list[int], order: str = "<") -> bytes:
    tags = {
        256: (SHORT, [image.width]), 257: (SHORT, [image.height]), 258: (SHORT, [8, 8, 8]), 259: (SHORT, [1]),
        262: (SHORT, [2]), 277: (SHORT, [3]), 278: (SHORT, [image.height]), tag: (kind, values),
    }  # fmt: skip
    return tiff(tags, [image.tobytes()], order)


def _text_of_exif(orientation: int) -> str:
    """As ImageMagick writes EXIF data into a PNG."""
    data = _PREFIX + _exif(orientation)
    return f"\nexif\n{len(data):8}\n{data.hex()}\n"


_Write = Callable[[Image.Image, int], bytes]

# Every way in which a file says how it is turned.
_WAYS: dict[str, _Write] = {
    "JPEG": lambda image, o: _jpeg(image, _PREFIX + _exif(o)),
    "JPEG, little endian": lambda image, o: _jpeg(image, _PREFIX + _exif(o, order="<")),
    "JPEG, as a byte": lambda image, o: _jpeg(image, _PREFIX + _exif(o, BYTE)),
    "JPEG, as a long": lambda image, o: _jpeg(image, _PREFIX + _exif(o, LONG, "<")),
    "JPEG, as a rational": lambda image, o: _jpeg(image, _PREFIX + _exif(o, _RATIONAL)),
    "JPEG, prefix twice": lambda image, o: _jpeg(image, 2 * _PREFIX + _exif(o)),
    "JPEG, no prefix": lambda image, o: _jpeg(image, _exif(o)),
    "JPEG, cut off": lambda image, o: _jpeg(image, _PREFIX + _exif(o)[:-4]),
    "JPEG, in two segments": lambda image, o: _jpeg(image, _PREFIX + _exif(o)[:9], _PREFIX + _exif(o)[9:]),
    "JPEG, no count": lambda image, o: _jpeg(image, _PREFIX + _exif(o, count=0)),
    "JPEG, XMP": lambda image, o: _jpeg(image, b"http://ns.adobe.com/xap/1.0/\0" + _xmp(o)),
    "JPEG, XMP element": lambda image, o: _jpeg(
        image, b"http://ns.adobe.com/xap/1.0/\0" + _xmp(o, element=True)
    ),
    "JPEG, EXIF before XMP": lambda image, o: _jpeg(
        image, b"http://ns.adobe.com/xap/1.0/\0" + _xmp(3), _PREFIX + _exif(o)
    ),
    "PNG": lambda image, o: _png(image, b"eXIf", _exif(o)),
    "PNG, with prefix": lambda image, o: _png(image, b"eXIf", _PREFIX + _exif(o, order="<")),
    "PNG, after the pixels": lambda image, o: _png(image, b"eXIf", _exif(o, LONG), last=True),
    "PNG, no count": lambda image, o: _png(image, b"eXIf", _exif(o, count=0)),
    "PNG, cut off": lambda image, o: _png(image, b"eXIf", _exif(o)[:-3]),
    "PNG, XMP": lambda image, o: _png_text(image, "XML:com.adobe.xmp", _xmp(o).decode(), packed=False),
    "PNG, packed XMP": lambda image, o: _png_text(
        image, "XML:com.adobe.xmp", _xmp(o, element=True).decode(), packed=True
    ),
    "PNG, text": lambda image, o: _png_text(image, "Raw profile type exif", _text_of_exif(o), packed=False),
    "PNG, packed text": lambda image, o: _png_text(
        image, "Raw profile type exif", _text_of_exif(o), packed=True
    ),
    "WebP": lambda image, o: _webp(image, b"EXIF", _exif(o), 8),
    "WebP, with prefix": lambda image, o: _webp(image, b"EXIF", _PREFIX + _exif(o, LONG, "<"), 8),
    "WebP, no flag": lambda image, o: _webp(image, b"EXIF", _exif(o), 0),
    "WebP, XMP": lambda image, o: _webp(image, b"XMP ", _xmp(o), 4),
    "TIFF": lambda image, o: _tiff(image, _ORIENTATION, SHORT, [o]),
    "TIFF, big endian": lambda image, o: _tiff(image, _ORIENTATION, SHORT, [o], ">"),
    "TIFF, as a byte": lambda image, o: _tiff(image, _ORIENTATION, BYTE, [o]),
    "TIFF, as a long": lambda image, o: _tiff(image, _ORIENTATION, LONG, [o], ">"),
    "TIFF, no count": lambda image, o: _tiff(image, _ORIENTATION, SHORT, []),
    "TIFF, XMP": lambda image, o: _tiff(image, _XMP_TAG, BYTE, list(_xmp(o))),
    "TIFF, XMP element": lambda image, o: _tiff(image, _XMP_TAG, BYTE, list(_xmp(o, element=True))),
    "deflated TIFF": lambda image, o: _saved(
        image, "TIFF", compression="tiff_adobe_deflate", tiffinfo={_ORIENTATION: o or 1}
    ),
    "TIFF of CMYK": lambda image, o: _saved(
        image.convert("CMYK"), "TIFF", tiffinfo={_ORIENTATION: o or 1}
    ),
    "TIFF whose 0 is white": lambda image, o: tiff(
        {256: (SHORT, [image.width]), 257: (SHORT, [image.height]), 258: (SHORT, [8]), 259: (SHORT, [1]),
         262: (SHORT, [0]), 277: (SHORT, [1]), 278: (SHORT, [image.height]), _ORIENTATION: (SHORT, [o])},
        [image.convert("L").tobytes()],
    ),
    "TIFF for Pillow": lambda image, o: _saved(
        image.convert("LA"), "TIFF", tiffinfo={_ORIENTATION: o}
    ),
    "AVIF": lambda image, o: _saved(image, "AVIF", quality=90, exif=_PREFIX + _exif(o)),
    "BMP": lambda image, _: _saved(image, "BMP"),
}  # fmt: skip


def _picture(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """Soft blobs that no turn leaves as they are."""
    coarse = Image.fromarray(random.integers(0, 256, (7, 5, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def _shown(encoded: bytes) -> Image.Image:
    """The picture as Pillow shows it, after converting orientations stored as bytes, which it ignores."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of metadata that are broken.
        image = Image.open(io.BytesIO(encoded))
        told = image.getexif().get(_ORIENTATION)
        image = ImageOps.exif_transpose(image).convert("RGB")
        if isinstance(told, bytes):
            image.getexif()[_ORIENTATION] = told[0]
            image = ImageOps.exif_transpose(image)
        return image


def _upright(encoded: bytes) -> bytes:
    """The same picture as a PNG without an orientation."""
    shown = _shown(encoded)
    shown.info = {}
    return _saved(shown, "PNG")


def _rows(folder: Path, name: str, encoded: list[bytes]) -> Rows:
    """The images as training reads them."""
    path = folder / f"{name}.parquet"
    pq.write_table(pa.table({"image": encoded}), path)
    return Rows.of(read_pieces(Reading.of(build_index(str(path), _DATA), [Piece(0, 0, len(encoded))]), _DATA))


def _views(rows: Rows) -> Iterator[torch.Tensor]:
    recipes = (_TURN, _TILT)
    request = make_request(rows, recipes, seed=3, epoch=0)
    ((views, _),) = make_views(iter([request]), recipes, batch_size=len(rows), threads=2)
    for view, recipe in zip(views, recipes, strict=True):
        yield view * torch.tensor(recipe.std)[:, None, None] * 255


@pytest.mark.parametrize("way", _WAYS)
def test_an_orientation_is_read_as_pillow_reads_it(way: str):
    random = np.random.default_rng(0)
    for orientation in range(9):
        encoded = _WAYS[way](_picture(random, 12, 7), orientation)
        header = read_header(encoded, max_pixels=100)
        assert (header.width, header.height) == _shown(encoded).size
        says_nothing = "no " in way or way == "BMP"
        assert header.orientation == (1 if says_nothing or not orientation else orientation)


def test_views_are_those_of_the_picture_saved_upright(tmp_path: Path):
    random = np.random.default_rng(1)
    ways, encoded = list(_WAYS.values()), []
    for n in range(6 * len(ways)):
        # Most are small, a few very long.
        width, height = (int(side) for side in np.exp(random.uniform(0, np.log(300), 2)))
        if n % 40 == 0:
            width, height = int(random.integers(1, 40)), 5000 - n
        encoded.append(ways[n % len(ways)](_picture(random, width, height), int(random.integers(1, 9))))
    stored = _rows(tmp_path, "stored", encoded)
    upright = _rows(tmp_path, "upright", [_upright(content) for content in encoded])
    assert not stored.is_bad.any()
    np.testing.assert_array_equal(stored.sizes, upright.sizes)
    # A crop is rounded to whole levels; of a value halfway between two a mirrored one may take the other. A
    # rotation rounds once more.
    for views, expected, largest in zip(_views(stored), _views(upright), (1.01, 2.01), strict=True):
        off = (views - expected).abs().amax(dim=(1, 2, 3))
        assert off.max() < largest, (int(off.argmax()), off.max())


def test_an_upright_image_has_bit_for_bit_the_same_views_beside_turned_ones(tmp_path: Path):
    random = np.random.default_rng(2)
    pictures = [_saved(_picture(random, 40, 30), "PNG") for _ in range(8)]
    turned = [_WAYS["PNG"](_picture(random, 40, 30), 1 + n) for n in range(8)]
    mixed = [pair for both in zip(pictures, turned, strict=True) for pair in both]
    alone = [pair for picture in pictures for pair in (picture, picture)]
    for views, expected in zip(
        _views(_rows(tmp_path, "mixed", mixed)), _views(_rows(tmp_path, "alone", alone)), strict=True
    ):
        assert torch.equal(views[::2], expected[::2])


@pytest.mark.parametrize(("width", "height"), [(64, 48), (192, 64), (5000, 1)])
def test_an_image_that_decodes_to_another_size_than_its_header_says_costs_only_itself(
    tmp_path: Path, width: int, height: int
):
    random = np.random.default_rng(3)
    rows = _rows(tmp_path, "rows", [_saved(_picture(random, width, height), "PNG") for _ in range(6)])
    right = make_request(rows, (_TURN,), seed=0, epoch=0)
    sizes = rows.sizes
    sizes[4] = sizes[4, ::-1]
    lying = Rows(**{**vars(rows), "height": sizes[:, 0], "width": sizes[:, 1]})
    seen = {}

    def repair(request: Request, reasons: dict[int, str]) -> Request:
        seen.update(reasons)
        return right

    request = make_request(lying, (_TURN,), seed=0, epoch=0)
    ((views, _),) = make_views(iter([request]), (_TURN,), batch_size=6, threads=1, repair=repair)
    ((expected, _),) = make_views(iter([right]), (_TURN,), batch_size=6, threads=1)
    assert seen == {4: f"decodes to {width} x {height} pixels, its header says {height} x {width}"}
    assert torch.equal(views[0], expected[0])
    with pytest.raises(RuntimeError, match="another size than its header says"):
        next(make_views(iter([request]), (_TURN,), batch_size=6, threads=1))


class _Once:
    """A source of one batch."""

    def __init__(self, batch: list) -> None:
        self._batches = iter([batch])

    def __call__(self) -> list:
        return next(self._batches)


@pytest.mark.parametrize("side", [0, 1])
def test_nothing_outside_an_image_is_read_where_a_side_is_shorter_than_expected(side: int):
    image = np.frombuffer(_saved(_picture(np.random.default_rng(4), 30, 20), "PNG"), np.uint8)
    sizes, expected = np.array([[20, 30]] * 3), np.array([[20, 30]] * 3)
    expected[1, side] = 10_000
    start, end = np.array([[2, 3]] * 3, np.float32), np.array([[18, 25]] * 3, np.float32)
    given, allowed = ((start.copy(), end.copy()) for _ in range(2))
    given[0][1, side], given[1][1, side] = 9_000, 9_999
    allowed[0][1, side], allowed[1][1, side] = 0, sizes[1, side]
    views = []
    for stored, region in ((expected, given), (sizes, allowed)):
        source = _Once([[image] * 3, stored, *region])
        pipeline = build_crops((_TURN,), source, batch_size=3, threads=1, gpu=None, prefetch=1)
        crops, found = pipeline.run()
        np.testing.assert_array_equal(found.as_array(), sizes)
        views.append(crops.as_array())
    np.testing.assert_array_equal(*views)
