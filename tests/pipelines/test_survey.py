"""A survey counts its input images correctly; decoding finds broken pixels."""

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.config import DataConfig
from pipelines.index import Index, build_index
from pipelines.inspection import Survey, hints, median_spread, report, survey
from pipelines.packing import all_readings
from pipelines.shards import write_shards


def _surveyed(index: Index, data: DataConfig, *, decode: bool) -> Survey:
    found = Survey()
    for reading in all_readings(index, 8):
        found.add(survey(reading, data, decode=decode))
    return found


def test_images_are_counted_by_class_size_and_format(
    index: Index, data: DataConfig, encoded: list[bytes], decode: Callable[[bytes], Image.Image]
):
    found = _surveyed(index, data, decode=True)
    sizes = [decode(content).size for content in encoded]
    assert found.heights == Counter(height for _, height in sizes)
    assert found.widths == Counter(width for width, _ in sizes)
    assert found.pixels == Counter(height * width for width, height in sizes)
    assert found.formats == Counter(Image.open(io.BytesIO(content)).format for content in encoded)
    assert found.labels == Counter(n % 10 for n in range(len(encoded)))
    assert found.bytes == sum(map(len, encoded))
    assert found.bad == {}
    values = report(index, found, ("zero", "one"), window_rows=4)
    assert values["classes"]["zero"] == 4
    assert values["classes"]["9"] == 3
    assert values["height"]["median"] == np.percentile(
        [height for _, height in sizes], 50, method="inverted_cdf"
    )


def _broken_png() -> bytes:
    """Its chunks are whole, and so its header fine, but its pixels are not compressed data."""
    out = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(out, "PNG")
    content = bytearray(out.getvalue())
    at = content.index(b"IDAT") + 4
    content[at : at + 200] = b"\xff" * 200
    return bytes(content)


def test_broken_pixels_are_found_by_decoding_alone(pngs: list[bytes], tmp_path: Path):
    rows = [(pngs[0], 0, "good"), (_broken_png(), 0, "broken"), (b"", 0, "empty"), (pngs[1], 0, "good too")]
    write_shards(rows, str(tmp_path), rows_per_shard=4, rows_per_group=4)
    data = DataConfig(train=str(tmp_path))
    index = build_index(data.train, data)
    assert _surveyed(index, data, decode=False).bad_images == 1
    found = _surveyed(index, data, decode=True)
    assert (found.images, found.bad_images) == (2, 2)
    assert found.bad["no bytes"] == (1, [("empty", index.paths[0])])
    assert ("broken", index.paths[0]) in [place for _, places in found.bad.values() for place in places]


def test_an_image_that_pillow_decodes_for_training_counts_as_what_it_is(pngs: list[bytes], tmp_path: Path):
    image, out = Image.open(io.BytesIO(pngs[0])), io.BytesIO()
    image.save(out, "GIF")
    torn = out.getvalue()[: len(out.getvalue()) // 2]
    write_shards(
        [(out.getvalue(), 0, "whole"), (torn, 0, "torn")], str(tmp_path), rows_per_shard=2, rows_per_group=2
    )
    data = DataConfig(train=str(tmp_path))
    found = _surveyed(build_index(data.train, data), data, decode=True)
    assert (found.formats, found.bytes) == (Counter(GIF=1), len(out.getvalue()))
    (reason,) = found.bad
    assert reason.startswith("its pixels cannot be decoded (")


def test_truncated_files_are_bad_by_their_header(kinds: dict[str, bytes], tmp_path: Path):
    rows = [(kinds[kind][:-60], 0, kind) for kind in ("JPEG", "PNG")]
    write_shards(rows, str(tmp_path), rows_per_shard=4, rows_per_group=4)
    data = DataConfig(train=str(tmp_path))
    found = _surveyed(build_index(data.train, data), data, decode=False)
    assert sorted(found.bad) == ["truncated JPEG", "truncated PNG"]


def test_faults_keep_their_count_and_a_few_examples():
    total = Survey()
    for n in range(9):
        total.add(Survey(bad={"no bytes": (2, [(f"key {n}", "path")])}))
    assert total.bad == {"no bytes": (18, [(f"key {n}", "path") for n in range(3)])}


@pytest.mark.parametrize(
    ("counts", "median"), [({5: 1}, 5), ({1: 3, 9: 2}, 1), ({1: 2, 9: 3}, 9), ({}, None)]
)
def test_the_median_is_numpys_lower_one(counts: dict[int, int], median: int | None):
    values = [value for value, count in counts.items() for _ in range(count)]
    assert median is None or np.percentile(values, 50, method="inverted_cdf") == median
    assert median_spread(Counter(counts)).get("median") == median


def test_row_groups_larger_than_a_window_are_hinted_at(index: Index):
    (hint,) = hints(index, Survey(formats=Counter(PNG=3), bytes=3 << 20), window_rows=3)
    assert "up to 4 rows, 4 MiB" in hint
    assert "window has 3" in hint
    assert hints(index, Survey(formats=Counter(PNG=3), bytes=3 << 20), window_rows=4) == []
