"""Progress: a bar on a terminal, lines in a log, and what a run finds always on standard output."""

import os
import pty
import re
import subprocess
import sys

import pytest

from cluster.run_bar import RunBar
from cluster.terminal import Bar, Startup, counted

_STEP = {
    "step": 3, "steps": 4, "epoch": 1, "loss": 2.5, "learning_rate": 0.1, "images_per_second": 1234.5,
    "data_wait_seconds": 0.25, "forward_seconds": 0.75, "view_matching": 0.5,
}  # fmt: skip
_FOUND = {"step": 2, "epoch": 1, "knn_top1": 0.8125, "knn_top1_pixels": 0.25}

_RUN = f"""
from cluster.run_bar import RunBar
from cluster.terminal import Startup

with RunBar(4, 1, 10, Startup()) as bar:
    bar.show({_FOUND!r})
    bar.show({_STEP!r})
    bar.show({_STEP | {"step": 4}!r})
"""
_EVALUATED = "step 2: kNN accuracy 81.2% (raw pixels 25.0%)"
_NOTE = (
    "epoch 1, loss 2.500, views matched 50.0% (chance 5.3%), learning rate 0.1, 1,234 images/s, 25% waiting "
    "for data"
)


def test_a_log_has_lines_of_progress_and_of_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    with RunBar(4, 1, 10, Startup()) as bar:
        bar.show(_FOUND)
        bar.show(_STEP)
        bar.show(_STEP | {"step": 4})
    out, err = capsys.readouterr()
    evaluated, started = out.splitlines()
    assert evaluated == _EVALUATED
    assert started.startswith("first step after ")
    (line,) = err.splitlines()
    assert re.fullmatch(r"train: 4 of 4 steps(, [\d,.]+ steps/s)?; " + re.escape(_NOTE), line)


def test_a_quick_count_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with counted("index", "file") as progress:
        progress(1, 2)
        progress(2, 2)
    assert capsys.readouterr() == ("", "")


def test_an_unknown_total_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("read", "image") as bar:
        bar.update(1200)
        bar.update(34)
    assert re.match(r"read: 1,234 images(,|$)", capsys.readouterr().err)


@pytest.mark.parametrize("stdout_too", [True, False], ids=["all of it", "standard error alone"])
def test_a_terminal_has_a_bar_below_the_lines(stdout_too: bool) -> None:
    terminal, end = pty.openpty()
    environment = os.environ | {"COLUMNS": "160", "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN],
        stdin=end, stdout=end if stdout_too else subprocess.PIPE, stderr=end, env=environment,
    )  # fmt: skip
    os.close(end)
    drawn = _read_all(terminal)
    piped, _ = process.communicate()
    printed = drawn if stdout_too else piped.decode()
    assert process.returncode == 0, drawn
    assert printed.count(_EVALUATED) == 1
    assert "4 of 4 steps" in drawn
    assert _NOTE in drawn
    if not stdout_too:
        assert len(printed.splitlines()) == 2
        assert _EVALUATED not in drawn


def _read_all(terminal: int) -> str:
    """What was written to the terminal, without escape sequences, once nobody has it open any more."""
    content = b""
    while True:
        try:
            content += os.read(terminal, 1 << 16)
        except OSError:  # Linux's way to say so.
            os.close(terminal)
            return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", content.decode())
