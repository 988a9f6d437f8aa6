"""Fixtures for the tests of clusters: a folder whose path has room for Ray's sockets."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short path, unlike pytest's."""
    folder = Path(tempfile.mkdtemp(prefix="d-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)
