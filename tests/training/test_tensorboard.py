"""TensorBoard's file holds the numbers of the lines, framed as TFRecord says."""

import struct
from pathlib import Path

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

from training.tensorboard import TensorBoard


def _events(path: Path) -> list[Event]:
    """The events of a file of records: length, its checksum, data, its checksum."""
    content, events = path.read_bytes(), []
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
    version, session, *lines = _events(path)
    assert version.file_version == "brain.Event:2"
    assert (session.step, session.session_log.status) == (6, SessionLog.START)
    found = [(line.step, {value.tag: value.simple_value for value in line.summary.value}) for line in lines]
    assert found == [
        (6, {"loss": 2.5, "learning_rate": pytest.approx(0.1)}),
        (7, {"quarantined": 3.0}),
    ]
    assert all(line.wall_time > 1.7e9 for line in lines)
