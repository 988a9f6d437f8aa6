"""The place of Ray's files: short enough for its sockets, and no one's but the user's."""

import os
import socket
from pathlib import Path

import pytest

from cluster.ray_folder import lasting_ray_folder, ray_folder, remove_ray_folder

# As Ray names them, the longest there are.
_SOCKET = "session_2026-11-27_04-53-01_123456_4194304/sockets/plasma_store.99"


def test_ray_may_open_its_own_as_the_one_above_is_closed(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(short / "n"))
    with ray_folder() as folder:
        assert Path(folder).parents[1] == short / "n"
        assert Path(folder).parent.stat().st_mode & 0o777 == 0o700
        os.makedirs(folder)
    lasting = lasting_ray_folder()
    assert Path(lasting).parent.stat().st_mode & 0o777 == 0o700
    remove_ray_folder(lasting)
    assert os.listdir(short / "n") == []


def test_the_folder_of_an_older_version_is_removed_alone(tmp_path: Path) -> None:
    (tmp_path / "diptych-old").mkdir()
    (tmp_path / "other").mkdir()
    remove_ray_folder(str(tmp_path / "diptych-old"))
    assert os.listdir(tmp_path) == ["other"]


def test_a_socket_can_be_bound_in_the_longest_place_and_a_longer_one_is_tmp(
    short: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for length in range(len(str(short)) + 2, 60):
        place = str(short / "x").ljust(length, "x")
        monkeypatch.setenv("RAY_TMPDIR", place)
        with ray_folder() as folder:
            path = Path(folder, _SOCKET)
            path.parent.mkdir(parents=True)
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(str(path))
            err = capsys.readouterr().err
            if folder.startswith("/tmp/diptych-"):
                assert err.startswith(f"diptych: Ray's files are in /tmp: the path {place} is too long")
                assert f"may have at most {length - 1} bytes" in err
                return
            assert folder.startswith(f"{place}/")
            assert err == ""
    pytest.fail("no place is too long")


def test_a_place_where_no_folder_can_be_made_is_one_line(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (short / "f").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(short / "f"))
    with (
        pytest.raises(ValueError, match=f"cannot make a folder in {short}.*; set RAY_TMPDIR to one that"),
        ray_folder(),
    ):
        pass
