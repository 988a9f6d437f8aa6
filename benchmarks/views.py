"""Encoded images to two float views each: diptych against lightly and torchvision.

    python benchmarks/views.py --photographs FOLDER --cifar FOLDER    # Parquet files with a column image
    python benchmarks/views.py --photographs FOLDER --cifar FOLDER --device cuda

All start from the same encoded bytes in memory and end with batches of normalised float32 tensors on the
device: diptych's DALI pipeline with its draws, lightly's SimCLRTransform on PIL images, and torchvision's v2
transforms on tensors. The last two run in a DataLoader with a worker process for each core and, as neither
makes views on a GPU, are copied to it. Photographs get SimCLR's recipe for ImageNet at 224 pixels, CIFAR-10
its recipe for 32. The three take turns. Prints images a second and CPU time of each, and diptych's ratios to
the others: medians over the rounds, lowest and highest.
"""

import argparse
import io
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from benchmarks.comparison import Comparison, add_json_option, spread, write_json
from benchmarks.machine import CORES, add_device_option, chosen_device, describe, finish
from benchmarks.samples import read_images
from pipelines.augment.dali import Request, make_views
from pipelines.augment.draws import draw
from pipelines.config import RECIPES, ViewRecipe
from pipelines.images.header import read_header

try:
    from lightly.data.multi_view_collate import MultiViewCollate
    from lightly.transforms import SimCLRTransform
except ImportError:
    sys.exit("benchmarks/views.py needs lightly; install it with: make bench")

_MOST_IMAGES = 20_000
_MAX_PIXELS = 100_000_000

# Images of a batch, of photographs and of small ones.
_BATCH_SIZES = {"cpu": (64, 256), "cuda": (256, 512)}


@dataclass(frozen=True)
class _Case:
    """Encoded images, the name of a recipe, and the strength of its jitter."""

    name: str
    images: list[bytes]
    recipe: str
    strength: float
    batch_size: int
    batches: int
    device: torch.device

    @property
    def recipes(self) -> tuple[ViewRecipe, ViewRecipe]:
        return RECIPES[self.recipe]


class _Encoded(Dataset):
    """Two views of each image, made from its bytes by `views`; the images repeat."""

    def __init__(self, case: _Case, views: Callable[[bytes], Sequence[torch.Tensor]]) -> None:
        self._images, self._length, self._views = case.images, case.batches * case.batch_size, views

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Sequence[torch.Tensor], int, str]:
        return self._views(self._images[index % len(self._images)]), 0, ""


def _lightly(case: _Case) -> DataLoader:
    recipe, _ = case.recipes
    transform = SimCLRTransform(input_size=recipe.size, cj_strength=case.strength, gaussian_blur=recipe.blur)

    def views(encoded: bytes) -> Sequence[torch.Tensor]:
        return transform(Image.open(io.BytesIO(encoded)).convert("RGB"))

    return _loader(case, views, MultiViewCollate())


def _torchvision(case: _Case) -> DataLoader:
    recipe, _ = case.recipes
    taps = recipe.size // 10 // 2 * 2 + 1
    jitter = v2.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    blur = [v2.RandomApply([v2.GaussianBlur(taps, recipe.blur_sigma)], recipe.blur)] if recipe.blur else []
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(recipe.size, recipe.crop_scale, recipe.crop_ratio, antialias=True),
            v2.RandomHorizontalFlip(recipe.flip),
            v2.RandomApply([jitter], recipe.jitter),
            v2.RandomGrayscale(recipe.grey),
            *blur,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(recipe.mean, recipe.std),
        ]
    )

    def views(encoded: bytes) -> Sequence[torch.Tensor]:
        image = decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)
        return [transform(image), transform(image)]

    return _loader(case, views, default_collate)


def _loader(case: _Case, views: Callable, collate: Callable) -> DataLoader:
    return DataLoader(
        _Encoded(case, views),
        batch_size=case.batch_size,
        num_workers=CORES,
        collate_fn=collate,
        persistent_workers=True,
        pin_memory=case.device.type == "cuda",
    )


def _diptych(case: _Case) -> Iterator[object]:
    """Endless batches; the reader's and the feed's work for each image is included."""

    def request(step: int) -> Request:
        samples = np.arange(step * case.batch_size, (step + 1) * case.batch_size)
        encoded = [case.images[sample % len(case.images)] for sample in samples]
        sizes = np.array([read_header(content, max_pixels=_MAX_PIXELS)[:2] for content in encoded])
        draws = tuple(
            draw(recipe, seed=0, epoch=0, view=view, samples=samples, sizes=sizes)
            for view, recipe in enumerate(case.recipes)
        )
        return Request([np.frombuffer(content, np.uint8) for content in encoded], draws)

    requests = map(request, itertools.count())
    gpu = case.device.index
    return make_views(requests, case.recipes, batch_size=case.batch_size, threads=CORES, gpu=gpu)


@dataclass(frozen=True)
class _Turn:
    """Images a second of one turn, and milliseconds of CPU an image, worker processes included."""

    rate: float
    cpu: float


def _timed(case: _Case, work: Callable[[], object]) -> _Turn:
    started, cpu = time.perf_counter(), _cpu_seconds()
    work()
    finish(case.device)
    images = case.batches * case.batch_size
    return _Turn(images / (time.perf_counter() - started), 1e3 * (_cpu_seconds() - cpu) / images)


def _cpu_seconds() -> float:
    """CPU time of this process and its workers so far."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    times = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in pids]
    return sum(int(user) + int(system) for user, system in times) / os.sysconf("SC_CLK_TCK")


def _turn_of_loader(loader: DataLoader, case: _Case) -> _Turn:
    def work() -> None:
        for views, *_ in loader:
            for view in views:
                view.to(case.device, non_blocking=True)

    return _timed(case, work)


def _turn_of_stream(views: Iterator[object], case: _Case) -> _Turn:
    for _ in range(4):  # Those that were made ahead during the others' turns.
        next(views)
    turn = _timed(case, lambda: [None for _ in itertools.islice(views, case.batches)])
    time.sleep(1)  # Those that are being made ahead must not take time from the next turn.
    return turn


def _measure(case: _Case, rounds: int) -> list[Comparison]:
    # Worker processes are forked, so they start before DALI's threads do.
    loaders = {"lightly": _lightly(case), "torchvision": _torchvision(case)}
    for loader in loaders.values():
        _turn_of_loader(loader, case)
    ours = _diptych(case)
    _turn_of_stream(ours, case)
    turns: dict[str, list[_Turn]] = {"diptych": [], "lightly": [], "torchvision": []}
    for _ in range(rounds):
        turns["diptych"].append(_turn_of_stream(ours, case))
        for name, loader in loaders.items():
            turns[name].append(_turn_of_loader(loader, case))
    print(f"{case.name}: batches of {case.batch_size}, {case.batches} a round, {rounds} rounds")
    for name, found in turns.items():
        rate, cpu = spread([turn.rate for turn in found], ",.0f"), spread([turn.cpu for turn in found], ".2f")
        print(f"  {name:<11} {rate} images/s, {cpu} ms of CPU an image")
    return [comparison for name in loaders for comparison in _compare(case, name, turns)]


def _compare(case: _Case, name: str, turns: dict[str, list[_Turn]]) -> list[Comparison]:
    pair = turns["diptych"], turns[name]
    rates, cpus = ([[getattr(turn, key) for turn in each] for each in pair] for key in ("rate", "cpu"))
    rate = Comparison(f"views of {case.name}", name, "images/s", *rates, more_is_better=True)
    cpu = Comparison(f"views of {case.name}", name, "ms of CPU an image", *cpus)
    print(
        f"  diptych / {name}: {spread(rate.ratios, '.2f')} in images/s, "
        f"{spread(cpu.ratios, '.2f')} in images per second of CPU"
    )
    return [rate, cpu]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--photographs", type=Path, help="folder of Parquet files, some 500 pixels a side")
    parser.add_argument("--cifar", type=Path, help="folder of Parquet files, 32 pixels a side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--batches", type=int, default=12, help="of photographs in a round; of small images twice as many"
    )
    add_device_option(parser)
    add_json_option(parser)
    arguments = parser.parse_args()
    device = chosen_device(arguments.device)
    print(describe(device, "lightly", "torch", "torchvision", "pillow", "nvidia-dali-cuda130"))
    large, small = _BATCH_SIZES[device.type]
    comparisons = []
    for folder, settings in (
        (arguments.photographs, ("photographs at 224 pixels", "simclr", 1.0, large, arguments.batches)),
        (arguments.cifar, ("small images at 32 pixels", "simclr-cifar", 0.5, small, 2 * arguments.batches)),
    ):
        name, *rest = settings
        if folder is None:
            print(f"{name}: skipped, as no folder is given")
            continue
        images = list(itertools.islice(read_images(folder, "*.parquet"), _MOST_IMAGES))
        comparisons += _measure(_Case(name, images, *rest, device), arguments.rounds)
    write_json(arguments.json, comparisons)


if __name__ == "__main__":
    main()
