"""A worker that takes the node's memory is ended by Ray's own monitor: the run says so, and recovers."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.digits import scattered_digits
from pipelines.shards import write_shards

pytestmark = [pytest.mark.ray, pytest.mark.slow]

_STEPS, _EVERY = 24, 4

# The command and its cluster have so much memory, and a greedy worker asks for so much. Ray ends workers at
# this share of the limit, more than a run of this size takes.
_LIMIT_BYTES, _THRESHOLD, _GREED_BYTES = 8 * 2**30, 0.6, 5 * 2**30

# In a control group of its own, which it sees as the machine's, as in a container.
_CONFINED = 'echo $$ > "$0/cgroup.procs"; mount --bind "$0" /sys/fs/cgroup/memory; exec "$@"'

_OBJECTIVE = """
import os
import torch
from torch.nn import functional as F
from training import Objective, rows_with_gradients

class Greedy(Objective):
    def __init__(self, encoder, *, gather, after: int, eaten: str = "", once: bool = True) -> None:
        super().__init__(encoder)
        self._gather, self._after, self._eaten, self._once = gather, after, eaten, once
        self._steps, self._hoard = 0, []

    def embed(self, views):
        return list(self.encoder(torch.cat(views.images)).chunk(2))

    def loss(self, embedded, views):
        self._steps += 1
        again = not self._once or not os.path.exists(self._eaten)
        if self._eaten and again and self._steps > self._after and self._gather.rank == 0:
            open(self._eaten, "w").close()
            while len(self._hoard) < {greed} >> 26:
                self._hoard.append(torch.ones(1 << 24))
        first, second = (F.normalize(rows_with_gradients(rows, self._gather)) for rows in embedded)
        distances = torch.cdist(first, first)
        return (first - second).square().sum(1).mean() + (-distances).exp().mean()
"""


@pytest.fixture(scope="module")
def confined() -> Iterator[list[str]]:
    """The start of a command that has so much memory; skips where no control group can be made."""
    groups = re.search(r"^\d+:memory:(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    if not groups:
        pytest.skip("needs control groups of memory, version 1")
    group = Path(f"/sys/fs/cgroup/memory{groups[1]}") / f"diptych-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"a control group needs root: {error}")
    (group / "memory.limit_in_bytes").write_text(str(_LIMIT_BYTES))
    yield ["unshare", "--mount", "sh", "-ec", _CONFINED, str(group)]
    _remove(group)


def _remove(group: Path) -> None:
    """Remove the control group, once the last of its processes has ended."""
    deadline = time.monotonic() + 60
    while (group / "cgroup.procs").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    group.rmdir()


def _train(confined: list[str], folder: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = (
        ["train", "--data.train", str(folder / "images"), "--output", str(folder), "--name", name]
        + ["--workers", "2", "--lanes", "4", "--batch-size", "64", "--steps", str(_STEPS), "--timeout", "60"]
        + ["--data.recipe", "simclr-cifar", "--data.window-rows", "24", "--encoder.name", "resnet8"]
        + ["--checkpoint.every-steps", str(_EVERY), "--evaluation.diagnostic-images", "0"]
        + [
            "--optimizer.name",
            "sgd",
            "--optimizer.learning-rate",
            "0.02",
            "--objective",
            "greedy:Greedy",
            *options,
        ]
    )
    there = {"RAY_ADDRESS": "local", "RAY_memory_usage_threshold": str(_THRESHOLD)}
    return subprocess.run(
        [*confined, sys.executable, "-m", "cluster", *arguments], cwd=folder, env=os.environ | there,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def _eating(after: int, noted: Path) -> tuple[str, ...]:
    """Options by which a worker takes all memory after so many of its steps, and leaves the file `noted`."""
    return "--objective-options.after", str(after), "--objective-options.eaten", str(noted)


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"step-{_STEPS:09}.pt", weights_only=True)["model"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and an objective that takes more memory than there is."""
    folder = tmp_path_factory.mktemp("memory")
    rows = scattered_digits(400, held_out=False, seed=4)
    write_shards(rows, str(folder / "images"), rows_per_shard=100, rows_per_group=50)
    (folder / "greedy.py").write_text(_OBJECTIVE.replace("{greed}", str(_GREED_BYTES)))
    return folder


_SAID = (
    r"worker \d failed: Ray ended it because its node ran out of memory, \S+ of \S+ being used; use nodes "
    r"with more, a smaller --data.window-bytes or --micro-batch-size \(traceback: "
)


def test_a_run_whose_worker_is_ended_for_its_memory_says_so_and_ends_as_an_undisturbed_one(
    confined: list[str], folder: Path
) -> None:
    eaten = folder / "eaten"
    disturbed = _train(confined, folder, "disturbed", *_eating(_STEPS // 2, eaten))
    assert disturbed.returncode == 0, disturbed.stdout + disturbed.stderr
    assert eaten.exists()
    assert re.search(f"resuming from this step: {_SAID}", disturbed.stdout), disturbed.stdout
    assert "(raylet)" not in disturbed.stdout + disturbed.stderr
    undisturbed = _train(confined, folder, "undisturbed", "--objective-options.after", str(_STEPS))
    assert undisturbed.returncode == 0, undisturbed.stdout + undisturbed.stderr
    for key, value in _weights(folder / "undisturbed").items():
        assert torch.equal(_weights(folder / "disturbed")[key], value), key


def test_one_whose_worker_needs_too_much_each_time_ends_with_one_line(
    confined: list[str], folder: Path
) -> None:
    eating = (*_eating(_EVERY // 2, folder / "always"), "--objective-options.once", "false")
    failed = _train(confined, folder, "failed", *eating, "--retries", "1")
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert re.match(f"diptych: {_SAID}", failed.stderr.splitlines()[-1]), failed.stderr
