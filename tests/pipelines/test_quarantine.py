"""The quarantine keeps each image once, over resumes, and says when there are too many."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.quarantine import Quarantine, Quarantined, decode, encode
from pipelines.sources import Index

_IMAGES = [Quarantined("train/0.tar", f"cat/{n}", "truncated JPEG") for n in range(3)]
_OTHER = Quarantined("test/0.tar", "dog", 'a "reason"\nof two lines')


def _index(rows: int) -> Index:
    return Index("train", "tar", pa.table({"path": ["train/0.tar"], "rows": [rows]}), True)


def test_images_come_back_from_their_lines():
    assert decode(encode([*_IMAGES, _OTHER])) == [*_IMAGES, _OTHER]
    assert encode([_OTHER]).count(b"\n") == 1


def test_each_image_is_written_once_and_a_resume_goes_on(tmp_path: Path):
    quarantine = Quarantine(str(tmp_path))
    quarantine.add(_IMAGES[:2])
    quarantine.write()
    quarantine.add(_IMAGES[1:2])
    quarantine.write()
    again = Quarantine(str(tmp_path))
    again.add(_IMAGES)
    again.write()
    assert len(again) == 3
    assert decode((tmp_path / "quarantine.jsonl").read_bytes()) == _IMAGES


def test_a_worker_that_does_not_write_only_counts(tmp_path: Path):
    quarantine = Quarantine(str(tmp_path))
    quarantine.add(_IMAGES)
    assert (len(quarantine), list(tmp_path.iterdir())) == (3, [])


def test_more_bad_training_images_than_allowed_end_the_run_with_the_way_out(tmp_path: Path):
    quarantine = Quarantine(str(tmp_path))
    quarantine.add([*_IMAGES, _OTHER])
    quarantine.write()
    quarantine.check(_index(300), 0.01)  # Three of 300; the test set's image does not count.
    with pytest.raises(
        ValueError, match=r"3 of 299 images are no good, .*max_bad_share=0.01; the first is cat/0 of "
    ):
        quarantine.check(_index(299), 0.01)
