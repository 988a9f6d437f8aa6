"""`diptych demo`, as a new user would run it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.ray
@pytest.mark.slow
def test_trained_encoder_beats_raw_pixels_and_the_untrained_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "diptych", "demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = dict(
        re.findall(r"^  (raw pixels|untrained encoder|trained encoder) +([\d.]+)%", done.stdout, re.M)
    )
    trained = float(printed["trained encoder"])
    assert trained >= float(printed["raw pixels"]) + 15
    assert trained >= float(printed["untrained encoder"]) + 15
    (run,) = (tmp_path / "runs").iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 193))
    assert "192" in (run / "report.html").read_text()
