"""What the tests of `training` share: real gloo ranks."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# The ranks' processes inherit the path, and find `ranks` on it as this one does.
sys.path.insert(0, str(Path(__file__).parent))

from ranks import Ranks


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """As many threads as the ranks have; several would only wait for one another on tensors this small."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[Callable]:
    """run_ranks(function, world_size, *args): function(*args) in real gloo ranks; the results by rank."""
    ranks = Ranks()
    yield ranks.run
    ranks.close()
