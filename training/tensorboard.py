"""The numbers of metrics.jsonl as a file that TensorBoard reads, in RUN/tensorboard."""

import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import register_writer_factory

from pipelines import storage
from pipelines.storage.growing import SEGMENT_BYTES, GrowingFile

# tensorboardX writes what it finds under this scheme with a writer of ours, as it does under s3 with its own.
_PREFIX = "diptych"

_NOT_SHOWN = ("step", "epoch")


class TensorBoard:
    """A file of events for each time that a run starts or resumes; in object storage a series of segments.

    The events stay in memory between flushes. tensorboardX's SummaryWriter would hand them to a thread
    through a queue of ten: it costs 0.4 ms a step, and once its disk is full the step waits for ever.
    """

    def __init__(self, run: str, start_step: int, segment_bytes: int = SEGMENT_BYTES) -> None:
        """TensorBoard drops what an earlier part of the run left beyond `start_step`."""
        uri = storage.join(run, "tensorboard", f"events.out.tfevents.{start_step:09}")
        self._file = GrowingFile(uri, segment_bytes=segment_bytes)
        register_writer_factory(_PREFIX, SimpleNamespace(open=lambda path: self._file))
        self._records = RecordWriter(f"{_PREFIX}:{uri}")
        self._write(Event(file_version="brain.Event:2"))
        # A session that starts at a step drops what there is from that step on.
        self._write(Event(step=start_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def append(self, values: Mapping[str, Any]) -> None:
        """Add the numbers of a line of metrics.jsonl, at its step."""
        shown = [
            Summary.Value(tag=key, simple_value=value)
            for key, value in values.items()
            if key not in _NOT_SHOWN and isinstance(value, int | float)
        ]
        self._write(Event(step=values["step"], summary=Summary(value=shown)))

    def flush(self) -> None:
        """Write the new events; raises OSError, and the next flush tries them again."""
        self._records.flush()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
