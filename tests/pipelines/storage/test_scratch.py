"""Temporary folders of a process: their owners, and when they are removed."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipelines.storage.scratch import scratch_folder

_OWNER = """
import sys
from pipelines.storage.scratch import scratch_folder
with scratch_folder(sys.argv[1]) as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def _owned(place: Path, start: Sequence[str] = ()) -> tuple[subprocess.Popen[str], Path]:
    """A process that owns a folder until its input ends, and the folder. start: the command's first part."""
    command = [*start, sys.executable, "-c", _OWNER, str(place)]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
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


def _in_namespaces(*commands: str) -> list[str]:
    """The start of a command for which these have changed the machine's name or the id of its start."""
    start = ["unshare", "--uts", "--mount", "sh", "-ec", "; ".join((*commands, 'exec "$@"')), "sh"]
    tried = subprocess.run([*start, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"namespaces need root: {tried.stderr.strip()}")
    return start


@pytest.mark.skipif(shutil.which("unshare") is None, reason="there is no unshare command")
@pytest.mark.parametrize(
    ("machine", "stays"),
    [("another", True), ("a container here", False), ("this one, started again", False)],
)
def test_that_of_a_process_on_another_machine_stays_though_its_lock_is_not_seen(
    machine: str, stays: bool, tmp_path: Path
) -> None:
    place, boot_id = tmp_path / "shared", tmp_path / "boot_id"
    place.mkdir()
    boot_id.write_text("00000000-0000-4000-8000-000000000000\n")
    named, started = "hostname another", f"mount --bind {boot_id} /proc/sys/kernel/random/boot_id"
    changes = {"another": (named, started), "a container here": (named,)}.get(machine, (started,))
    # Killed, its lock is as free as one that this machine does not see.
    owner, left = _owned(place, _in_namespaces(*changes))
    _end(owner, signal.SIGKILL)
    with scratch_folder(str(place)) as folder:
        assert {*place.iterdir()} == {Path(folder), *([left] if stays else [])}
