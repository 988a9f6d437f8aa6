"""Ray's token: made for its owner alone, and taken from others who can read one that Ray has made."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private.authentication.authentication_token_setup import generate_and_save_token
from strangers import needs_root, open_home, stranger_reads

from cluster.auth_token import ensure_token, open_to_others
from cluster.doctor.node_checks import token_results

_RAY_FINDS = """
from ray._raylet import AuthenticationTokenLoader
print(AuthenticationTokenLoader.instance().get_raw_token(ignore_auth_mode=True))
"""


@pytest.fixture
def home() -> Iterator[Path]:
    with open_home() as there:
        yield there


def _modes(home: Path) -> list[int]:
    return [(home / path).stat().st_mode & 0o777 for path in (".ray", ".ray/auth_token")]


def _result(exposed: str | None) -> tuple[str, str]:
    (one,) = token_results({"a": {"open_token": exposed}})
    return one.level, one.found


def test_it_is_made_for_its_owner_alone_once_and_ray_finds_it(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ensure_token()
    token = (home / ".ray" / "auth_token").read_text()
    assert _modes(home) == [0o700, 0o600]
    assert len(bytes.fromhex(token)) == 32
    ensure_token()
    assert (home / ".ray" / "auth_token").read_text() == token
    assert [path.name for path in (home / ".ray").iterdir()] == ["auth_token"]
    assert capsys.readouterr().err == ""
    found = subprocess.run([sys.executable, "-c", _RAY_FINDS], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == token, found.stderr


@needs_root
def test_one_that_ray_has_made_is_taken_from_others(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate_and_save_token()
    path = home / ".ray" / "auth_token"
    token = path.read_text()
    assert stranger_reads(path) == token
    ensure_token()
    assert stranger_reads(path) == "PermissionError"
    assert _modes(home) == [0o700, 0o600]
    assert path.read_text() == token
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"diptych: {path} has mode 0644: other users of this machine could read")


def test_doctor_tells_of_one_that_others_can_read_or_replace(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    generate_and_save_token()
    path = home / ".ray" / "auth_token"
    path.chmod(0o640)
    assert _result(open_to_others()) == ("warning", f"{path} has mode 0640")
    ensure_token()
    path.parent.chmod(0o770)
    assert _result(open_to_others()) == ("warning", f"{path.parent} has mode 0770")
    ensure_token()
    assert _result(open_to_others())[0] == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert _result(None) == ("warning", "not required")


def test_an_empty_one_is_none(home: Path) -> None:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.touch()
    ensure_token()
    assert path.read_text()
    assert _modes(home) == [0o700, 0o600]


def test_one_that_the_environment_names_is_used_as_it_is(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = home / "mine"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(mine))
    with pytest.raises(ValueError, match=f"RAY_AUTH_TOKEN_PATH={mine} has no token; unset it, or write"):
        ensure_token()
    mine.write_text("token")
    mine.chmod(0o644)
    ensure_token()
    assert mine.stat().st_mode & 0o777 == 0o644
    assert (
        f"{mine} has mode 0644: other users of this machine can read Ray's token" in capsys.readouterr().err
    )
    assert home.stat().st_mode & 0o777 == 0o755
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token")
    mine.unlink()
    ensure_token()
    assert not (home / ".ray").exists()


def test_a_home_that_cannot_be_used_is_one_line(home: Path) -> None:
    (home / ".ray").write_text("a file")
    with pytest.raises(ValueError, match=f"cannot use {home}/.ray/auth_token: .*; set RAY_AUTH_TOKEN_PATH"):
        ensure_token()


def test_several_that_make_it_at_once_use_the_same(home: Path) -> None:
    path = home / ".ray" / "auth_token"
    make = f"""
import sys
from cluster.auth_token import ensure_token
print("ready", flush=True)
sys.stdin.read()
ensure_token()
print(open({str(path)!r}).read())
"""
    pipe = subprocess.PIPE
    makers = [
        subprocess.Popen([sys.executable, "-c", make], stdin=pipe, stdout=pipe, text=True) for _ in range(4)
    ]
    assert [one.stdout.readline() for one in makers if one.stdout] == ["ready\n"] * 4
    for one in makers:
        assert one.stdin
        one.stdin.close()
    found = {one.stdout.read() for one in makers if one.stdout}
    for one in makers:
        with one:
            assert one.wait() == 0
    assert found == {f"{path.read_text()}\n"}
    assert os.listdir(path.parent) == ["auth_token"]
