"""Jobs on the terminal: what one sends, all of a cluster, and one in full."""

import time
from datetime import datetime
from typing import Any

from cluster.staging import ENTRYPOINT, Staged


def print_staged(job: Staged, address: str) -> None:
    """What would be sent and installed, and what would run."""
    print(f"{address}: {job.why}")
    for name, content in sorted(job.files.items()):
        print(f"{len(content):>9,}  {name}")
    print(f"{job.size:>9,}  bytes in {len(job.files)} files would be sent")
    print(f"runs: {job.entrypoint}")


def print_jobs(jobs: list[Any]) -> None:
    """A line for each."""
    rows = [("job", "status", "started", "took", "command")]
    for job in jobs:
        rows.append((job.submission_id, str(job.status), _time(job.start_time), _took(job), _command(job)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for *cells, command in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), command]))


def print_job(job: Any) -> None:
    """All that there is to know of one job."""
    rows = {
        "job": job.submission_id,
        "status": str(job.status),
        "command": _command(job),
        "started": _time(job.start_time),
        "took": _took(job),
        "exit code": "" if job.driver_exit_code is None else str(job.driver_exit_code),
        "message": (job.message or "").splitlines()[0] if job.message else "",
    }
    for key, value in rows.items():
        if value:
            print(f"{key:9}  {value}")


def _command(job: Any) -> str:
    return job.entrypoint.replace(ENTRYPOINT, "diptych")


def _time(milliseconds: int | None) -> str:
    return f"{datetime.fromtimestamp(milliseconds / 1e3):%Y-%m-%d %H:%M:%S}" if milliseconds else ""


def _took(job: Any) -> str:
    if not job.start_time:
        return ""
    seconds = int((job.end_time or time.time() * 1e3) - job.start_time) // 1000
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
