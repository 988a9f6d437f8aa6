"""Whether a cluster can train: every check, its result, and all of them as a table."""

import io
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster import staging
from cluster.auth_token import open_to_others
from cluster.ray_cluster import address, cluster
from pipelines import storage
from pipelines.augment.dali import Request, make_views
from pipelines.augment.draws import draw
from pipelines.config import ViewRecipe


def run_doctor(
    storage: str | None = None,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    wait_for_nodes: float = 0.0,
) -> int:
    """Check the cluster that commands use here, or this machine; how many faults would stop a run.

    `storage` is a URI that every node must reach; `workers` how many to start, unset: as many as fit. A
    cluster that grows by itself is given `wait_for_nodes` seconds to do so. Raises ValueError where the
    cluster does not answer.
    """
    there = address()
    with cluster(cpus=2), Console(stderr=True).status("asking the nodes ..."):
        # Both import Ray, which reads its environment as it is imported.
        from cluster.doctor.node_checks import check_nodes
        from cluster.doctor.worker_checks import check_workers, have_nodes_come

        if wait_for_nodes:
            have_nodes_come(workers, gpus_per_worker, wait_for_nodes)
        findings = [*check_nodes(storage), *check_workers(workers, gpus_per_worker)]
    print(f"cluster at {there}" if there else "no cluster is running: this machine alone")
    print_findings(findings)
    if faults := sum(one.level == "fault" for one in findings):
        print(f"diptych: {faults} of {len(findings)} checks failed", file=sys.stderr)
    else:
        print("this cluster can train")
    return faults


Level = Literal["ok", "told", "fault"]


@dataclass(frozen=True)
class Finding:
    """What one check found, where, and the way out; `told` is no fault, but worth a look."""

    check: str
    where: str
    found: str
    level: Level = "ok"
    way_out: str = ""


# Of lines where no terminal sets it.
_LOG_WIDTH = 160

_COLOURS = {"ok": "green", "told": "yellow", "fault": "red"}


def print_findings(findings: list[Finding]) -> None:
    """A row for each, with its way out below it."""
    table = Table(box=None, pad_edge=False)
    for heading in ("", "check", "where", "found"):
        table.add_column(heading, overflow="fold")
    for one in findings:
        found = f"{one.found}\n-> {one.way_out}" if one.way_out else one.found
        # Text: what a node says may have brackets, which would be taken for a style.
        table.add_row(Text(one.level, _COLOURS[one.level]), one.check, one.where, Text(found))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _LOG_WIDTH
    Console(width=width).print(table)


_PACKAGES = ("torch", "torchvision", "pyarrow", "nvidia-dali-cuda130")

# A storage that is away is told soon, and not waited for as a run would.
_STORAGE_SECONDS = 10

_BYTES = 8 * 2**20


@dataclass(frozen=True)
class About:
    """Versions by name, bytes of shared memory, and how others can read Ray's token, if they can."""

    versions: dict[str, str]
    shared_memory: int
    open_token: str | None


class Examiner:
    """Asked by the driver, in a process of the node."""

    def __init__(self) -> None:
        os.environ["DIPTYCH_STORAGE_TIMEOUT"] = str(_STORAGE_SECONDS)

    def about(self) -> dict[str, Any]:
        """The fields of About."""
        return asdict(about())

    def views(self, gpu: bool) -> Float[np.ndarray, "views images 3 size size"]:
        """The two views of three images that DALI makes here, on the CPU or on this process's first GPU."""
        return example_views(gpu=0 if gpu else None)

    def gpu(self) -> str:
        """Name of this process's first GPU. Raises RuntimeError where its driver does not work."""
        return torch.cuda.get_device_name(0)

    def write(self, uri: str, name: str) -> float:
        """Bytes a second of writing a file of 8 MiB below `uri`."""
        began = time.perf_counter()
        storage.write(storage.join(uri, name), bytes(_BYTES))
        return _BYTES / (time.perf_counter() - began)

    def read(self, uri: str, name: str) -> float:
        """Bytes a second of reading another node's file. Raises ValueError where it is not there."""
        began = time.perf_counter()
        if storage.read(storage.join(uri, name)) != bytes(_BYTES):
            raise ValueError("what another node has written cannot be read here")
        return _BYTES / (time.perf_counter() - began)

    def remove(self, uri: str, name: str) -> None:
        """Delete what `write` has written."""
        storage.remove(storage.join(uri, name))

    def now(self) -> float:
        """Seconds since 1970 by this node's clock."""
        return time.time()


def about() -> About:
    """Of this process and its machine."""
    versions = {"Python": platform.python_version(), "Ray": metadata.version("ray")}
    versions |= {package: metadata.version(package) for package in _PACKAGES}
    versions["diptych"] = f"{metadata.version('diptych')} ({(staging.fingerprint() or '')[:8]})"
    shared = os.statvfs("/dev/shm")
    return About(versions, shared.f_frsize * shared.f_blocks, open_to_others())


def example_views(*, gpu: int | None) -> Float[np.ndarray, "views images 3 size size"]:
    """SimCLR's two views of three images of noise, with the same draws wherever they are made."""
    recipes = (ViewRecipe(size=32),) * 2
    generator = np.random.default_rng(0)
    sizes = np.array([[40, 60], [64, 48], [50, 50]])
    images = [
        _jpeg(generator.integers(0, 256, (height // 8, width // 8, 3)), (width, height))
        for height, width in sizes.tolist()
    ]
    draws = tuple(
        draw(recipe, seed=0, epoch=0, view=view, samples=np.arange(3), sizes=sizes)
        for view, recipe in enumerate(recipes)
    )
    request = Request(images, draws)
    views, _ = next(make_views(iter([request]), recipes, batch_size=3, threads=1, gpu=gpu))
    return torch.stack(views).cpu().numpy()


def _jpeg(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).resize(size).save(out, "JPEG")
    return np.frombuffer(out.getvalue(), np.uint8)
