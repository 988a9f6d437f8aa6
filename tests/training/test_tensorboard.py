"""TensorBoard's file holds the numbers of the lines, framed as TFRecord says."""

import struct
import uuid
from pathlib import Path

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

from pipelines import storage
from training.tensorboard import TensorBoard


def _events(content: bytes) -> list[Event]:
    """The events of a file of records: length, its checksum, data, its checksum."""
    events = []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        data = content[12 : 12 + length]
        for part, checksum in ((content[:8], content[8:12]), (data, content[12 + length : 16 + length])):
            rotated = crc32c(part)
            masked = (((rotated >> 15) | (rotated << 17)) + 0xA282EAD8) & 0xFFFFFFFF
            assert struct.unpack("<I", checksum) == (masked,)
        events.append(Event.FromString(data))
        content = content[16 + length :]
    return events


def test_each_line_is_an_event_of_its_numbers(tmp_path: Path) -> None:
    board = TensorBoard(str(tmp_path), 5)
    board.append({"step": 6, "epoch": 1, "loss": 2.5, "learning_rate": 0.1})
    board.append({"step": 7, "epoch": 1, "warning": "a text", "quarantined": 3})
    board.flush()
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert path.name == "events.out.tfevents.000000005"
    version, session, *lines = _events(path.read_bytes())
    assert version.file_version == "brain.Event:2"
    assert (session.step, session.session_log.status) == (6, SessionLog.START)
    found = [(line.step, {value.tag: value.simple_value for value in line.summary.value}) for line in lines]
    assert found == [
        (6, {"loss": 2.5, "learning_rate": pytest.approx(0.1)}),
        (7, {"quarantined": 3.0}),
    ]
    assert all(line.wall_time > 1.7e9 for line in lines)


def _steps(events: list[Event]) -> list[int]:
    return [event.step for event in events if event.summary.value]


def test_a_flush_appends_events_and_a_resume_at_the_same_step_begins_the_file_anew(tmp_path: Path) -> None:
    board, path = TensorBoard(str(tmp_path), 0), tmp_path / "tensorboard" / f"events.out.tfevents.{0:09}"
    for step in (1, 2):
        before = path.read_bytes() if path.exists() else b""
        board.append({"step": step, "loss": 1.0})
        board.flush()
        assert path.read_bytes().startswith(before)
    assert _steps(_events(path.read_bytes())) == [1, 2]
    board = TensorBoard(str(tmp_path), 0)
    board.append({"step": 1, "loss": 1.0})
    board.flush()
    assert _steps(_events(path.read_bytes())) == [1]


def test_each_segment_in_s3_has_whole_events(bucket: str) -> None:
    run = f"{bucket}/{uuid.uuid4().hex}"
    board = TensorBoard(run, 5, segment_bytes=200)
    for step in range(6, 30):
        board.append({"step": step, "loss": 1.0})
        board.flush()
    names = storage.names(f"{run}/tensorboard")
    assert names[:2] == ["events.out.tfevents.000000005", "events.out.tfevents.000000005.00002"]
    parts = [_events(storage.read(f"{run}/tensorboard/{name}") or b"") for name in names]
    assert len(parts) >= 4
    assert [step for events in parts for step in _steps(events)] == list(range(6, 30))
