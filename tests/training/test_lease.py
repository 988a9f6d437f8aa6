"""One process at a time trains a run: those that have ended, and those that have not."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest

from pipelines import storage
from training import lease
from training.lease import leased

_HOLD = """
import sys
from threading import Event
from training import lease
from training.lease import leased
if sys.argv[2:]:  # On another machine, as far as leases tell.
    lease._machine, lease._RENEW_SECONDS = lambda: sys.argv[2], 0.05
with leased(sys.argv[1], Event()):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def _holder(folder: str, *machine: str) -> Iterator[subprocess.Popen]:
    """Another process that holds the folder's lease until its input ends, or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, folder, *machine],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    with (
        _holder(folder) as first,
        pytest.raises(ValueError, match=rf"{folder} is being written by process {first.pid} on "),
        leased(folder, Event()),
    ):
        pass
    with leased(folder, Event()):
        assert storage.names(folder) == ["lease.json"]
    assert storage.names(folder) == []


def test_one_that_was_killed_leaves_its_place_at_once_on_its_own_machine(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    with _holder(folder) as first:
        first.kill()
        first.wait()
        with leased(folder, Event()):
            pass


def test_elsewhere_one_that_is_renewed_is_refused_and_one_that_is_not_expires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(lease, "_EXPIRY_SECONDS", 0.5)
    with _holder(str(tmp_path), "another machine") as first:
        with pytest.raises(ValueError, match="is being written"), leased(str(tmp_path), Event()):
            pass
        first.kill()
        first.wait()
        with leased(str(tmp_path), Event()):
            pass
    assert storage.names(str(tmp_path)) == []


def test_whoever_loses_its_lease_hears_of_it_and_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.05)
    taken = Event()
    with leased(str(tmp_path), taken):
        assert not taken.is_set()
        (tmp_path / "lease.json").write_text(
            json.dumps(json.loads((tmp_path / "lease.json").read_text()) | {"key": "another's"})
        )
        assert taken.wait(60)
    assert json.loads((tmp_path / "lease.json").read_text())["key"] == "another's"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"cannot write .*file/run: .*; choose another --output"),
        leased(str(tmp_path / "file" / "run"), Event()),
    ):
        pass


def test_a_lease_that_is_gone_was_another_process_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.05)
    folder, taken = str(tmp_path / "run"), Event()
    with leased(folder, taken):
        assert not taken.wait(0.3)
        for _ in range(600):  # It may come back once: from a renewal that had just looked.
            # As one that has taken it over does at its end.
            (tmp_path / "run" / "lease.json").unlink(missing_ok=True)
            if taken.wait(0.1):
                break
        assert taken.is_set()


def test_a_lease_that_could_not_be_removed_hinders_nobody_of_the_same_process(tmp_path: Path) -> None:
    folder, place = str(tmp_path / "run"), tmp_path / "run" / "lease.json"
    with leased(folder, Event()):
        left = place.read_bytes()
    place.write_bytes(left)
    with leased(folder, Event()):
        pass
    assert not place.exists()


@pytest.mark.parametrize("renewed", [None, "now"])
def test_what_is_no_lease_is_none(tmp_path: Path, renewed: object) -> None:
    folder, place = str(tmp_path / "run"), tmp_path / "run" / "lease.json"
    with leased(folder, Event()):
        values = json.loads(place.read_bytes())
    place.write_text(json.dumps(values | {"renewed": renewed}))
    with leased(folder, Event()):
        pass
