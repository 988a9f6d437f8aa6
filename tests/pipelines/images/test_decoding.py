"""Images that do not decode, and those that end the process that decodes them."""

import signal

import numpy as np
import pyarrow as pa
import pytest
from animated import broken_animation

from pipelines.images.decoding import faults, known_bad, screened, undecodable
from pipelines.images.isolation import ENDS_PROCESS, Crash, Isolated
from pipelines.reader import SCHEMA


def decoded_here(image: bytes) -> dict[int, str]:
    return undecodable([np.frombuffer(image, np.uint8)], np.array([[64, 128]]))


@pytest.fixture(scope="module")
def deadly() -> bytes:
    """An image that crashes the process in which DALI decodes it; this fixture checks that it does."""
    work = Isolated(decoded_here)
    image = broken_animation()
    assert list(work.each([image])) == [Crash(signal.SIGSEGV)]
    work.close()
    return image


def table(images: list[bytes]) -> pa.Table:
    """Rows of reader.SCHEMA."""
    n = len(images)
    keys = [f"image {number}" for number in range(n)]
    columns = {
        "image": images, "label": [0] * n, "path": ["a.parquet"] * n, "key": keys, "sample": range(n),
        "height": [64] * n, "width": [128] * n, "orientation": [1] * n, "bad": [None] * n,
    }  # fmt: skip
    return pa.table({name: pa.array(values, SCHEMA.field(name).type) for name, values in columns.items()})


def test_an_image_that_ends_the_decoder_is_bad_and_the_ones_after_it_are_looked_at(
    deadly: bytes, kinds: dict[str, bytes]
) -> None:
    good = kinds["PNG"]
    reasons = list(faults([good, deadly, good[:200] + b"garbled" + good[207:], good], converted=True))
    assert reasons[0] is reasons[3] is None
    assert reasons[1] == f"{ENDS_PROCESS} (SIGSEGV)"
    assert "cannot be decoded" in str(reasons[2])


def test_pillow_takes_what_would_end_dali(deadly: bytes) -> None:
    assert list(faults([deadly])) == [None]


def test_of_a_stream_the_rows_asked_for_are_screened(deadly: bytes, kinds: dict[str, bytes]) -> None:
    tables = [table([deadly, deadly]), table([deadly, deadly])]
    bad = [part["bad"].to_pylist() for part in screened(tables, 3)]
    reason = f"{ENDS_PROCESS} (SIGSEGV)"
    assert bad == [[reason, reason], [reason, None]]


def test_known_images_are_bad_wherever_they_come_again(deadly: bytes) -> None:
    known = {("a.parquet", "image 1", 1): "known"}
    (part,) = known_bad([table([deadly] * 3)], known)
    assert part["bad"].to_pylist() == [None, "known", None]
    # Others of its key are not.
    one_key = table([deadly] * 3).set_column(3, "key", pa.array(["image 1"] * 3))
    (part,) = known_bad([one_key], known)
    assert part["bad"].to_pylist() == [None, "known", None]
    (same,) = known_bad([table([deadly])], {})
    assert same["bad"].to_pylist() == [None]
