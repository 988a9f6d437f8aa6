"""Folders of one process: whose they are, and when they go."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.scratch import scratch_folder

_OWNER = """
import sys
from pipelines.scratch import scratch_folder
with scratch_folder(sys.argv[1]) as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def _owned(place: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that has a folder until its input ends, and that."""
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout
    return owner, Path(owner.stdout.readline().strip())


def _end(owner: subprocess.Popen[str], number: int) -> None:
    owner.send_signal(number)
    owner.communicate()


def test_it_is_its_owners_alone_and_goes_at_the_end(tmp_path: Path) -> None:
    with scratch_folder(str(tmp_path)) as folder:
        assert os.stat(folder).st_mode & 0o777 == 0o700
        (Path(folder) / "file").write_text("content")
    assert list(tmp_path.iterdir()) == []


def test_after_an_error_it_goes_at_once_or_with_the_next(tmp_path: Path) -> None:
    for keep_failed in (False, True):
        with pytest.raises(KeyError), scratch_folder(str(tmp_path), keep_failed=keep_failed):
            raise KeyError
        assert len(list(tmp_path.iterdir())) == keep_failed
    with scratch_folder(str(tmp_path)) as folder:
        assert list(tmp_path.iterdir()) == [Path(folder)]


def test_that_of_a_process_which_was_killed_goes_with_the_next_and_no_other_does(tmp_path: Path) -> None:
    lives, its = _owned(tmp_path)
    killed, left = _owned(tmp_path)
    (left / "deep").mkdir()
    (left / "deep" / "link").symlink_to(tmp_path)
    not_ours = tmp_path / "diptych-notes"
    not_ours.mkdir()
    _end(killed, signal.SIGKILL)
    assert left.exists()
    with scratch_folder(str(tmp_path)) as folder:
        assert {*tmp_path.iterdir()} == {its, not_ours, Path(folder)}
    _end(lives, signal.SIGKILL)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_another_users_stays(tmp_path: Path) -> None:
    killed, left = _owned(tmp_path)
    _end(killed, signal.SIGKILL)
    os.chown(left, 65534, 65534)
    with scratch_folder(str(tmp_path)):
        assert left.exists()
