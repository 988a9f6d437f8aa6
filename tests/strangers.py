"""Another user of the machine, and a home folder that he can enter: what is closed in it, the code closes."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")

# Imports come first: the interpreter itself may lie where the other user cannot go.
_AS_NOBODY = """
import os, sys
{imports}
os.setgroups([]); os.setgid({nobody}); os.setuid({nobody})
{code}
"""


def as_stranger(imports: str, code: str, *arguments: str) -> str:
    """What Python prints that runs `code` as another user, with `arguments` in sys.argv[1:]."""
    script = _AS_NOBODY.format(imports=imports, code=code, nobody=NOBODY)
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stranger_reads(path: Path) -> str:
    """The first line of the file, the names in the folder, or the kind of error that another user gets."""
    code = """
try:
    place = sys.argv[1]
    print(sorted(os.listdir(place)) if os.path.isdir(place) else open(place).readline())
except OSError as error:
    print(type(error).__name__)
"""
    return as_stranger("", code, str(path)).strip()


@contextmanager
def open_home() -> Iterator[Path]:
    """A home folder that all users can enter."""
    home = Path(tempfile.mkdtemp(prefix="diptych-home-"))
    home.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        yield home
    shutil.rmtree(home)
