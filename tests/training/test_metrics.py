"""metrics.jsonl through stops and resumes."""

import json
from pathlib import Path

from training.metrics import MetricsLog, read_metrics


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
    assert read_metrics(str(tmp_path)) == values


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
    assert read_metrics(str(tmp_path)) == []
    log.flush()
    assert len(read_metrics(str(tmp_path))) == 3
