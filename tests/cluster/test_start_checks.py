"""A machine that cannot start a Ray cluster says so in one line, before Ray tries."""

import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest
from small_disks import Full, Harm, NoInodes, small_disk

from cluster.ray_folder import ray_folder
from cluster.start_checks import check_start, checked_start, watched_room

_NUMBER = "import resource; from cluster.start_checks import check_start; check_start(); "
_NUMBER += "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"


@contextmanager
def _limited(soft: int) -> Iterator[int]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_soft_limit_of_open_files_is_raised() -> None:
    with _limited(256) as hard:
        check_start()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, 65536), hard)


def test_a_hard_limit_is_told_with_the_way_out() -> None:
    done = subprocess.run(
        ["bash", "-c", 'ulimit -n 256; exec "$0" -c "$1"', sys.executable, _NUMBER],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ValueError: this process may open 256 files, and a Ray cluster needs 1,024: run ulimit -n 1024 in a "
        "new shell, or ask for a higher hard limit"
    )


def _fail(harm: Harm) -> None:
    harm.begin()
    raise RuntimeError("what Ray says then")


@pytest.mark.parametrize(
    ("kind", "said"),
    [(Full, r"has 0 MiB free, and needs \d+"), (NoInodes, r"has room for 0 files, and needs it for 500")],
)
def test_a_place_without_room_for_rays_files_is_told_before_and_after_a_start(
    kind: type[Harm], said: str, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(short / "s", "size=24m,nr_inodes=2000") as place:
        monkeypatch.setenv("RAY_TMPDIR", str(place / "b"))
        told = rf"^Ray's temporary folder in {place}/b {said}; free space there, or set RAY_TMPDIR$"
        harm = kind(place)
        with checked_start():
            pass
        with pytest.raises(ValueError, match=told) as failed, checked_start():
            _fail(harm)
        assert str(failed.value.__context__) == "what Ray says then"
        with pytest.raises(ValueError, match=told), checked_start():
            pytest.fail("it was started")
        harm.end()
        with pytest.raises(RuntimeError, match="another reason"), checked_start():
            raise RuntimeError("another reason")


def test_room_is_looked_for_where_rays_files_are_though_the_temporary_folder_s_path_is_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "small", "size=24m") as place:
        (long := place / ("x" * 60)).mkdir()
        Full(place).begin()
        for name, setting in (("RAY_TMPDIR", str(long)), ("TMPDIR", str(long))):
            monkeypatch.setenv(name, setting)
            monkeypatch.setattr(tempfile, "tempdir", None)  # It has been looked for already.
            check_start()
            with ray_folder() as folder:
                assert folder.startswith("/tmp/")
            monkeypatch.delenv(name)


def test_a_place_that_fills_up_meanwhile_is_told_once(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    told = Event()

    def warn(message: str) -> None:
        said.append(message)
        told.set()

    with small_disk(short / "s", "size=24m") as place:
        monkeypatch.setenv("RAY_TMPDIR", str(place))
        with watched_room(warn, look_seconds=0.01):
            assert not said
            Full(place).begin()
            assert told.wait(60)
            Event().wait(0.2)  # Several looks more.
    (message,) = said
    assert message.startswith(f"Ray's temporary folder in {place} has ")
    assert message.endswith(": until then, a run may stall")
