"""An actor on each node that reports versions, memory, views, exact bits, storage and clock to the doctor."""

import io
import os
import platform
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from cluster import installed
from cluster.auth_token import open_to_others
from pipelines import storage
from pipelines.augment.dali import Request, make_views
from pipelines.augment.draws import draw
from pipelines.config import ViewRecipe
from training.determinism import kind_of_machine
from training.selftest import exact_bits

_PACKAGES = ("torch", "torchvision", "pyarrow", "nvidia-dali-cuda130")

# Report a storage outage soon; a run would wait longer.
_STORAGE_SECONDS = 10

_BYTES = 8 * 2**20


@dataclass(frozen=True)
class NodeInfo:
    """Versions by name, bytes of shared memory, and how others can read Ray's token; None if they cannot."""

    versions: dict[str, str]
    shared_memory: int
    open_token: str | None


class NodeAgent:
    """Answers the driver from a process of the node."""

    def __init__(self) -> None:
        os.environ["DIPTYCH_STORAGE_TIMEOUT"] = str(_STORAGE_SECONDS)

    def node_info(self) -> dict[str, Any]:
        """The fields of `NodeInfo`."""
        return asdict(node_info())

    def views(self, gpu: bool) -> Float[np.ndarray, "views images 3 size size"]:
        """Two views of three images, made by DALI on this node's CPU or this process's first GPU."""
        return example_views(gpu=0 if gpu else None)

    def gpu(self) -> str:
        """Name of this process's first GPU. Raises RuntimeError if its driver does not work."""
        return torch.cuda.get_device_name(0)

    def exact_step(self, gpu: bool) -> tuple[str, dict[str, str]]:
        """Digest of an exact step on this node's CPU or this process's first GPU, and the kind of machine."""
        device = torch.device("cuda", 0) if gpu else torch.device("cpu")
        return exact_bits(device), kind_of_machine(device)

    def write(self, uri: str, name: str) -> float:
        """Write a file of 8 MiB below `uri`; returns bytes per second."""
        began = time.perf_counter()
        storage.write(storage.join(uri, name), bytes(_BYTES))
        return _BYTES / (time.perf_counter() - began)

    def read(self, uri: str, name: str) -> float:
        """Read another node's file; returns bytes per second. Raises ValueError if it is not there."""
        began = time.perf_counter()
        if storage.read(storage.join(uri, name)) != bytes(_BYTES):
            raise ValueError("what another node has written cannot be read here")
        return _BYTES / (time.perf_counter() - began)

    def remove(self, uri: str, name: str) -> None:
        """Delete the file that `write` wrote."""
        storage.remove(storage.join(uri, name))

    def now(self) -> float:
        """Seconds since 1970, by this node's clock."""
        return time.time()


def node_info() -> NodeInfo:
    """Versions and settings of this process and its machine."""
    versions = {"Python": platform.python_version(), "Ray": metadata.version("ray")}
    versions |= {package: metadata.version(package) for package in _PACKAGES}
    versions["diptych"] = f"{metadata.version('diptych')} ({(installed.fingerprint() or '')[:8]})"
    shared = os.statvfs("/dev/shm")
    return NodeInfo(versions, shared.f_frsize * shared.f_blocks, open_to_others())


def example_views(*, gpu: int | None) -> Float[np.ndarray, "views images 3 size size"]:
    """SimCLR's two views of three noise images; the draws are the same on every node."""
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
