"""Small pictures of every kind that a data set holds, as encoded images and as Parquet shards."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines import shards
from pipelines.config import DataConfig, ViewRecipe
from pipelines.index import Index, build_index

_EXIF_ORIENTATION, _QUARTER_TURN = 0x0112, 6
_SIZES = [(48, 64), (75, 50), (40, 40), (33, 91), (120, 57), (64, 200)]

_IMAGES = 37


def _picture(height: int, width: int, seed: int) -> Image.Image:
    """Soft blobs of colour with some grain, neither black nor white anywhere."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(70, 180, (4, 5, 3), np.uint8))
    blobs = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    grain = random.integers(-15, 16, (height, width, 3))
    return Image.fromarray((blobs + grain).clip(50, 200).astype(np.uint8))


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture(scope="session")
def decode() -> Callable[[bytes], Image.Image]:
    """PIL's reading of an image, upright and in RGB."""
    return lambda encoded: ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB")


@pytest.fixture(scope="session")
def pngs() -> list[bytes]:
    """Lossless pictures of several sizes, which all decoders decode alike."""
    return [_encoded(_picture(*_SIZES[seed % len(_SIZES)], seed), "PNG") for seed in range(24)]


@pytest.fixture(scope="session")
def kinds() -> dict[str, bytes]:
    """One picture, 96 high and 160 wide as it is shown, in every kind."""
    picture = _picture(96, 160, seed=100)
    lying = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[_EXIF_ORIENTATION] = _QUARTER_TURN
    return {
        "JPEG": _encoded(picture, "JPEG", quality=95),
        "grey JPEG": _encoded(picture.convert("L"), "JPEG", quality=95),
        "CMYK JPEG": _encoded(picture.convert("CMYK"), "JPEG", quality=95),
        "rotated JPEG": _encoded(lying, "JPEG", quality=95, exif=exif),
        "PNG": _encoded(picture, "PNG"),
        "grey PNG": _encoded(picture.convert("L"), "PNG"),
        "rotated PNG": _encoded(lying, "PNG", exif=exif),
        "WebP": _encoded(picture, "WEBP", quality=95),
    }


@pytest.fixture(scope="session")
def encoded(pngs: list[bytes], kinds: dict[str, bytes]) -> list[bytes]:
    """The images of the data set at `uri`: many sizes, every seventh image a JPEG out of `kinds`."""
    jpegs = [content for kind, content in kinds.items() if "JPEG" in kind]
    return [jpegs[n // 7 % 4] if n % 7 == 0 else pngs[n % len(pngs)] for n in range(_IMAGES)]


@pytest.fixture(scope="session")
def uri(encoded: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of four Parquet shards, whose labels are the samples' numbers modulo 10."""
    folder = str(tmp_path_factory.mktemp("shards"))
    rows = ((content, n % 10, f"image {n}") for n, content in enumerate(encoded))
    shards.write_shards(rows, folder, rows_per_shard=10, rows_per_group=4)
    return folder


@pytest.fixture(scope="session")
def data(uri: str) -> DataConfig:
    return DataConfig(train=uri, view=ViewRecipe(size=32), window_rows=4)


@pytest.fixture(scope="session")
def index(uri: str, data: DataConfig) -> Index:
    return build_index(uri, data)
