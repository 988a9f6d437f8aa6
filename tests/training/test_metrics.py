"""metrics.jsonl through stops and resumes."""

import json
import math
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flips import noticed
from proxy import proxied

from cluster.objectstore import S3Server
from pipelines import storage
from pipelines.storage.checksums import encode_lines
from training.metrics import MetricsLog, read_metrics
from training.metrics_table import Metrics


def _log(run: Path, resume_step: int, steps: range) -> MetricsLog:
    log = MetricsLog(str(run), resume_step)
    for step in steps:
        log.append(step=step, loss=float(step))
    return log


def test_every_line_is_a_json_object_in_the_order_of_appending(tmp_path: Path) -> None:
    log = _log(tmp_path, 0, range(1, 4))
    log.append(step=3, knn_top1=0.5)
    log.flush()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(list(line)[-1] == "crc32" for line in lines)
    values = [{key: value for key, value in line.items() if key != "crc32"} for line in lines]
    assert values == [{"step": n, "loss": float(n)} for n in (1, 2, 3)] + [{"step": 3, "knn_top1": 0.5}]
    assert list(read_metrics(str(tmp_path))) == values


def test_lines_after_the_step_of_a_resume_are_dropped_and_each_step_appears_once(tmp_path: Path) -> None:
    _log(tmp_path, 0, range(1, 8)).flush()
    _log(tmp_path, 5, range(6, 10)).flush()
    assert [line["step"] for line in read_metrics(str(tmp_path))] == list(range(1, 10))


def test_a_run_that_starts_again_from_nothing_keeps_no_line(tmp_path: Path) -> None:
    _log(tmp_path, 0, range(8)).flush()
    _log(tmp_path, 0, range(3)).flush()
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [0, 1, 2]


def test_nothing_is_written_before_a_flush(tmp_path: Path) -> None:
    log = _log(tmp_path, 0, range(3))
    assert list(read_metrics(str(tmp_path))) == []
    log.flush()
    assert len(read_metrics(str(tmp_path))) == 3


def test_numbers_are_columns_and_lines_are_dictionaries_of_what_they_have(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"step": 0, "workers": 2},
        {"step": 1, "loss": 2.0},
        {"step": 1, "warning": 'a "text"} of ü\u2028 and\n more'},
        {"step": 2, "loss": 3},
        {"step": 3, "loss": 1e-300, "effective_rank": math.nan},
    ]
    log = MetricsLog(str(tmp_path), 0)
    for line in lines:
        log.append(**line)
    log.flush()
    for found in (read_metrics(str(tmp_path)), Metrics.of(lines)):
        assert repr(list(found)) == repr([*lines[:3], {"step": 2, "loss": 3.0}, lines[4]])
        assert [found[index] for index in (0, 3, -2)] == [lines[0], lines[3], lines[3]]
        assert repr(found[-1]) == repr(lines[4])
        assert list(found[1:3]) == lines[1:3]
        assert len(found) == 5
        steps = found.having("loss")
        assert steps.column("step").tolist() == [1, 2, 3]
        assert steps.column("loss").tolist() == [2, 3, 1e-300]
        assert [line["step"] for line in steps[-2:]] == [2, 3]
        assert len(found.having("effective_rank")) == 1
        assert np.isnan(found.column("workers")).tolist() == [False, True, True, True, True]
        assert list(found.having("no such key")) == []
        assert np.isnan(found.column("no such key")).all()
        with pytest.raises(IndexError):
            found[5]


def test_values_of_several_kinds_under_one_key_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.5}\n{"step": 2, "loss": "much"}\n')
    with pytest.raises(ValueError, match=rf"^{tmp_path}/metrics.jsonl has values of several kinds under one"):
        read_metrics(str(tmp_path))


def test_a_line_that_a_killed_process_has_left_unfinished_is_dropped_by_reading_and_by_a_resume(
    tmp_path: Path,
) -> None:
    _log(tmp_path, 0, range(1, 4)).flush()
    file = tmp_path / "metrics.jsonl"
    whole = file.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in range(last + 1):
        file.write_bytes(whole[: len(whole) - cut])
        steps = [1, 2, 3] if cut < 2 else [1, 2]
        assert [line["step"] for line in read_metrics(str(tmp_path))] == steps
        _log(tmp_path, 3, range(4, 6)).flush()
        assert [line["step"] for line in read_metrics(str(tmp_path))] == [*steps, 4, 5]
    file.write_bytes(whole[:5])
    assert list(read_metrics(str(tmp_path))) == []


def test_every_bit_of_the_last_line_is_checked(tmp_path: Path) -> None:
    _log(tmp_path, 0, range(1, 4)).flush()
    file = tmp_path / "metrics.jsonl"
    whole, lines = file.read_bytes(), list(read_metrics(str(tmp_path)))
    start = whole.rindex(b"{")
    before, last = whole[:start], whole[start:]

    def read(end: bytes) -> list[dict[str, Any]]:
        file.write_bytes(before + end)
        return list(read_metrics(str(tmp_path)))

    assert last.startswith(b'{"step": 3,')
    assert noticed(read, last, same=lambda found, _: found == lines) > 0.8


def test_a_damaged_line_of_a_large_file_is_named(tmp_path: Path) -> None:
    _log(tmp_path, 0, range(1, 350_001)).flush()
    file = tmp_path / "metrics.jsonl"
    content = file.read_bytes()
    assert len(content) > 1 << 24
    file.write_bytes(content.replace(b'"step": 340001,', b'"step": 340000,'))
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged in line 340001: its checksum does not "):
        read_metrics(str(tmp_path))
    log = MetricsLog(str(tmp_path), 200_000)
    log.append(step=200_001)
    log.flush()
    assert file.read_bytes().count(b"\n") == 200_001
    assert read_metrics(str(tmp_path)).column("step").tolist() == list(range(1, 200_002))


def test_a_run_killed_between_a_write_of_its_metrics_and_its_checkpoint_has_each_step_once(
    tmp_path: Path,
) -> None:
    write = (
        "import os, signal, sys; from training.metrics import MetricsLog\n"
        "log = MetricsLog(sys.argv[1], 0)\n"
        "for step in range(1, 8): log.append(step=step, loss=float(step)); log.flush()\n"
        "log.append(step=8); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", write, tmp_path], check=False).returncode == -signal.SIGKILL
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [1, 2, 3, 4, 5, 6, 7]
    log = _log(tmp_path, 5, range(6, 10))
    assert log.last_step == 5
    log.flush()
    assert [line["step"] for line in read_metrics(str(tmp_path))] == list(range(1, 10))


def test_skipped_steps_up_to_the_resume_are_counted(tmp_path: Path) -> None:
    log = MetricsLog(str(tmp_path), 0)
    for step in range(1, 8):
        log.append(step=step, **({"skipped": step // 2} if step % 2 == 0 else {"loss": 1.0}))
    log.flush()
    assert [MetricsLog(str(tmp_path), step).skipped for step in (0, 1, 5, 9)] == [0, 0, 2, 3]


_SEGMENT_BYTES = 1000


def _s3_log(run: str, resume_step: int, steps: range) -> MetricsLog:
    log = MetricsLog(run, resume_step, _SEGMENT_BYTES)
    for step in steps:
        log.append(step=step, loss=float(step))
        log.flush()
    return log


def test_in_s3_a_resume_writes_no_earlier_segment_and_reading_joins_all(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = f"{bucket}/{uuid.uuid4().hex}"
    _s3_log(run, 0, range(1, 101))
    parts = storage.names(run)
    assert parts == ["metrics.jsonl", *(f"metrics.jsonl.{number:05}" for number in range(2, len(parts) + 1))]
    assert len(parts) >= 5
    assert read_metrics(run).column("step").tolist() == list(range(1, 101))
    with proxied(s3.variables["AWS_ENDPOINT_URL"], monkeypatch) as proxy:
        log = _s3_log(run, 50, range(51, 53))
        assert log.last_step == 50
        assert proxy.count("PUT", "metrics.jsonl") == proxy.count("PUT", "metrics.jsonl.00002") == 0
    assert read_metrics(run).column("step").tolist() == list(range(1, 53))
    left = storage.names(run)
    assert left == parts[: len(left)]
    assert len(left) < len(parts)
    storage.remove(f"{run}/{left[-1]}")  # The tail is lost.
    kept = read_metrics(run).column("step").tolist()
    log = _s3_log(run, 52, range(53, 55))
    assert log.last_step == kept[-1] < 50
    assert read_metrics(run).column("step").tolist() == [*kept, 53, 54]


def test_in_s3_a_file_that_was_cut_is_damaged(bucket: str) -> None:
    run = f"{bucket}/{uuid.uuid4().hex}"
    _s3_log(run, 0, range(1, 30))
    parts = storage.names(run)
    for name in (parts[0], parts[-1]):
        whole = storage.read(f"{run}/{name}") or b""
        storage.write(f"{run}/{name}", whole[:-20])
        with pytest.raises(ValueError, match=f"{run}/{name} is damaged in line "):
            read_metrics(run)
        storage.write(f"{run}/{name}", whole)
    assert len(read_metrics(run)) == 29


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_a_run_of_an_earlier_version_is_read_and_resumed(where: str, tmp_path: Path, bucket: str) -> None:
    run = str(tmp_path) if where == "disk" else f"{bucket}/{uuid.uuid4().hex}"
    # As it was written: all lines in one file, whatever its size.
    lines = [{"step": step, "loss": float(step)} for step in range(1, 101)]
    earlier = encode_lines(lines)
    storage.write(f"{run}/metrics.jsonl", earlier)
    assert list(read_metrics(run)) == lines
    _s3_log(run, 100, range(101, 103))
    assert storage.names(run) == ["metrics.jsonl", "metrics.jsonl.00002"][: 1 if where == "disk" else 2]
    assert (storage.read(f"{run}/metrics.jsonl") or b"").startswith(earlier)
    _s3_log(run, 60, range(61, 63))
    assert list(read_metrics(run)) == [*lines[:60], *({"step": step, "loss": step} for step in (61, 62))]
