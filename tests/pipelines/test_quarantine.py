"""The quarantine keeps each image once, over resumes, and says when there are too many."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.batches import Rows
from pipelines.config import DataConfig
from pipelines.images.isolation import ENDS_PROCESS
from pipelines.index import Index, build_index
from pipelines.plan import evaluation_windows
from pipelines.quarantine import Quarantine, Quarantined, decode, encode, read_quarantine
from pipelines.reader import read_windows

_IMAGES = [Quarantined("train/0.tar", f"cat/{n}", "truncated JPEG", n) for n in range(3)]
_OTHER = Quarantined("test/0.tar", "dog", 'a "reason"\nof two lines', 0)


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


def test_only_new_images_are_encoded(tmp_path: Path):
    """Lines of the file stay as they are, even one that this version would write differently."""
    before = b'{"path": "train/0.tar", "key":   "by hand", "reason": "no bytes"}'
    (tmp_path / "quarantine.jsonl").write_bytes(before)
    quarantine = Quarantine(str(tmp_path))
    for image in _IMAGES:
        quarantine.add([image])
        quarantine.write()
    content = (tmp_path / "quarantine.jsonl").read_bytes()
    assert content == before + b"\n" + encode(_IMAGES)
    assert len(Quarantine(str(tmp_path))) == 4


def test_images_that_are_added_later_and_those_of_another_index_are_counted(tmp_path: Path):
    quarantine = Quarantine(str(tmp_path))
    for number, image in enumerate([*_IMAGES, _OTHER]):
        quarantine.add([image])
        quarantine.check(both := _index(10), min(number + 1, 3) / 10)
        quarantine.check(both, min(number + 1, 3) / 10)
    kept = _index(10)
    for count in range(2):
        with pytest.raises(ValueError, match=f"^{3 + count} of 10 images are bad"):
            quarantine.check(kept, 0.25)
        quarantine.add([Quarantined("train/0.tar", "late", "no bytes", 9)])


def test_images_of_one_file_with_one_key_are_as_many_as_they_are(
    index: Index, data: DataConfig, tmp_path: Path
):
    """Ten images of one key, of which three are empty: three count, not one."""
    (table,) = (pq.read_table(path) for path in sorted(Path(data.train).glob("*.parquet"))[:1])
    images = [b"" if row % 4 == 0 else image for row, image in enumerate(table["image"].to_pylist())]
    same = pa.table({"image": images, "label": table["label"], "key": ["cat"] * len(table)})
    (tmp_path / "images").mkdir()
    pq.write_table(same, tmp_path / "images" / "0.parquet", row_group_size=5)
    repeated = DataConfig(train=str(tmp_path / "images"))
    listed = build_index(repeated.train, repeated)
    tables = read_windows(listed, repeated, evaluation_windows(listed.rows, 0, 1, window_rows=5))
    bad = [image for part in tables for image in Rows.of(part).quarantined]
    expected = [row for row in range(len(table)) if row % 4 == 0]
    quarantine = Quarantine(str(tmp_path))
    quarantine.add(decode(encode(bad)))
    quarantine.write()
    assert [image.sample for image in read_quarantine(str(tmp_path / "quarantine.jsonl"))] == expected
    again = Quarantine(str(tmp_path))
    again.add(bad)
    assert len(again) == len(expected)
    with pytest.raises(ValueError, match=f"^{len(expected)} of {len(table)} images are bad"):
        again.check(listed, 0.2)


def test_one_that_ends_the_process_costs_no_other_of_its_key(tmp_path: Path):
    quarantine = Quarantine(str(tmp_path))
    quarantine.add([Quarantined("0.tar", "cat", f"{ENDS_PROCESS} (SIGSEGV)", 3)])
    quarantine.add([Quarantined("0.tar", "cat", "no bytes", 4)])
    assert quarantine.crashes == {("0.tar", "cat", 3): f"{ENDS_PROCESS} (SIGSEGV)"}


def test_lines_of_an_earlier_version_have_no_number(tmp_path: Path):
    (tmp_path / "quarantine.jsonl").write_text('{"path": "0.tar", "key": "cat", "reason": "no bytes"}\n')
    assert read_quarantine(str(tmp_path / "quarantine.jsonl")) == [Quarantined("0.tar", "cat", "no bytes")]


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
        ValueError, match=r"3 of 299 images are bad, .*max_bad_share=0.01; the first is cat/0 of "
    ):
        quarantine.check(_index(299), 0.01)
