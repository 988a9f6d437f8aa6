"""Disks of a few megabytes, and what may happen to them: full, without inodes, read-only, gone."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, options: str = "size=8m") -> Iterator[Path]:
    """A file system of its own at `folder`, which is made; skips the test where none may be mounted."""
    folder.mkdir()
    mounted = _mount("-t", "tmpfs", "-o", options, "tmpfs", str(folder))
    if mounted.returncode:
        pytest.skip(f"mounting a small disk needs root: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)


class Harm:
    """Something that keeps a disk from taking writes, and its end."""

    def __init__(self, disk: Path) -> None:
        self.disk = disk

    def begin(self) -> None:
        raise NotImplementedError

    def end(self) -> None:
        raise NotImplementedError


class Full(Harm):
    """Not a byte left."""

    def begin(self) -> None:
        with (self.disk / "ballast").open("wb", buffering=0) as file:
            for size in (1 << 16, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue

    def end(self) -> None:
        (self.disk / "ballast").unlink()


class NoInodes(Harm):
    """Room for bytes, but for no further file."""

    def begin(self) -> None:
        (self.disk / "many").mkdir()
        try:
            for number in range(1 << 16):
                (self.disk / "many" / str(number)).touch()
        except OSError:
            return
        raise AssertionError("the disk takes any number of files; mount it with nr_inodes=")

    def end(self) -> None:
        shutil.rmtree(self.disk / "many")


class ReadOnly(Harm):
    """Mounted so that it can only be read, as Linux does after an error of the disk."""

    def begin(self) -> None:
        assert not _mount("-o", "remount,ro", str(self.disk)).returncode

    def end(self) -> None:
        assert not _mount("-o", "remount,rw", str(self.disk)).returncode


class Unmounted(Harm):
    """Its folder is there, and empty."""

    def begin(self) -> None:
        self._away = self.disk.with_name("away")
        self._away.mkdir()
        assert not _mount("--move", str(self.disk), str(self._away)).returncode

    def end(self) -> None:
        assert not _mount("--move", str(self._away), str(self.disk)).returncode
        self._away.rmdir()
