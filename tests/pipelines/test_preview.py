"""A contact sheet shows the images upright, and below them the same views as in training."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from pipelines.augment.dali import make_views
from pipelines.batches import Rows
from pipelines.config import DataConfig, ViewRecipe
from pipelines.feed import make_request
from pipelines.index import Index, build_index
from pipelines.inspection import contact_sheet
from pipelines.plan import Piece
from pipelines.reader import Reading, read_pieces

_RECIPE = ViewRecipe(size=96)
_PITCH = 96 + 4


@pytest.fixture(scope="module")
def table(index: Index, data: DataConfig) -> pa.Table:
    """Six images; that of sample 21 is a rotated JPEG."""
    return read_pieces(Reading.of(index, [Piece(fragment, 0, 2) for fragment in (1, 6, 3)]), data)


def _sheet(content: bytes) -> np.ndarray:
    """The sheet on white paper."""
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.mode) == ("PNG", "RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return np.asarray(Image.alpha_composite(paper, image).convert("RGB")).astype(int)


def test_a_sheet_has_a_column_for_each_image_and_a_row_for_it_and_each_view(table: pa.Table):
    for images, columns in ((4, 4), (12, 6)):
        sheet = _sheet(contact_sheet(table, (_RECIPE, _RECIPE), seed=0, images=images))
        assert sheet.shape == (3 * _PITCH - 4, columns * _PITCH - 4, 3)


def test_what_is_no_picture_is_transparent(table: pa.Table):
    with Image.open(io.BytesIO(contact_sheet(table, (_RECIPE, _RECIPE), seed=0))) as image:
        opaque = np.asarray(image)[:, :, 3] > 0
    assert not opaque[96:_PITCH].any()
    assert not opaque[:, 96:_PITCH].any()
    for column, row in enumerate(table.select(["height", "width"]).to_pylist()):
        height, width = row["height"], row["width"]
        shown = opaque[:96, column * _PITCH : column * _PITCH + 96]
        assert shown.mean() == pytest.approx(min(height, width) / max(height, width), abs=0.02)


def test_small_views_are_magnified(table: pa.Table):
    sheet = _sheet(contact_sheet(table, (replace(_RECIPE, size=32),) * 2, seed=0))
    assert sheet.shape == (3 * _PITCH - 4, 6 * _PITCH - 4, 3)
    np.testing.assert_array_equal(sheet[_PITCH : _PITCH + 96 : 3], sheet[_PITCH + 2 : _PITCH + 96 : 3])


def test_the_first_row_shows_the_whole_images_upright(
    table: pa.Table, decode: Callable[[bytes], Image.Image]
):
    sheet = _sheet(contact_sheet(table, (_RECIPE, _RECIPE), seed=0))
    for column, content in enumerate(table["image"].to_pylist()):
        expected = np.asarray(ImageOps.pad(decode(content), (96, 96), color="white"))
        np.testing.assert_array_equal(sheet[:96, column * _PITCH : column * _PITCH + 96], expected)


def test_the_other_rows_show_the_views_of_that_seed_and_epoch(table: pa.Table):
    sheet = _sheet(contact_sheet(table, (_RECIPE, _RECIPE), seed=3, epoch=2))
    request = make_request(Rows.of(table), (_RECIPE, _RECIPE), seed=3, epoch=2)
    ((views, _),) = make_views(iter([request]), (_RECIPE, _RECIPE), batch_size=6, threads=2)
    mean, std = (np.array(values)[:, None, None] for values in (_RECIPE.mean, _RECIPE.std))
    for row, batch in enumerate(views, start=1):
        for column, view in enumerate(batch.numpy()):
            shown = sheet[row * _PITCH :, column * _PITCH :][:96, :96]
            assert np.abs(shown - (255 * (view * std + mean)).transpose(1, 2, 0)).max() < 0.51


def test_an_image_with_broken_exif_data_is_shown_as_it_is_stored(tmp_path: Path):
    out = io.BytesIO()
    Image.new("RGB", (96, 48), (9, 99, 200)).save(out, "JPEG", exif=b"Exif\0\0MM\0*\0")
    pq.write_table(pa.table({"image": [out.getvalue()]}), tmp_path / "broken.parquet")
    data = DataConfig(train=str(tmp_path))
    rows = read_pieces(Reading.of(build_index(data.train, data), [Piece(0, 0, 1)]), data)
    sheet = _sheet(contact_sheet(rows, (_RECIPE, _RECIPE), seed=0))
    assert np.abs(sheet[26:70, 2:94] - (9, 99, 200)).max() < 5
