"""Deeper plain nets train worse than shallow ones, deeper residual nets do not. He et al. 2015, figure 6.

    python benchmarks/degradation.py CIFAR    # a folder of CIFAR-10's train-*.parquet: columns image, label

Trains the CIFAR nets of section 4.2 with a classifier, plain and residual, as the paper does: SGD with
momentum 0.9 and weight decay 1e-4, crops out of padded images, flips, a learning rate that falls to a tenth
after a half and after three quarters of the epochs. By default on 512 images of 16 pixels, which takes
minutes on two cores, and at a learning rate of 0.02: at the paper's 0.1 even deep residual nets hardly learn
in so few steps. The paper's experiment is --images 50000 --size 32 --batch-size 128 --epochs 164
--learning-rate 0.1 --depths 20 32 44 56 110. Prints the training error at the end, on whole images;
--picture draws that of every epoch, on the crops.
"""

import argparse
import io
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.machine import add_device_option, chosen_device, describe
from training.config.encoder import EncoderConfig
from training.models.encoders import build_encoder

_CLASSES = 10
_FAMILIES = {"plain": "plain", "resnet": "residual"}

Images = Float[Tensor, "n 3 size size"]
Labels = Int[Tensor, " n"]


def train(
    name: str, images: Images, labels: Labels, arguments: argparse.Namespace, seed: int
) -> tuple[list[float], float]:
    """Training error in each epoch, on the crops, and after the last, on whole images."""
    torch.manual_seed(seed)
    encoder = build_encoder(EncoderConfig(name=name))
    model = nn.Sequential(encoder, nn.Linear(encoder.dim, _CLASSES)).to(images.device)
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD(model.parameters(), arguments.learning_rate, momentum=0.9, weight_decay=1e-4)
    epochs = arguments.epochs
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2, epochs * 3 // 4])
    curve = []
    for _ in range(epochs):
        wrong = 0
        for rows in torch.randperm(len(images)).split(arguments.batch_size):
            scores = model(_augmented(images[rows]))
            loss = F.cross_entropy(scores, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            wrong += int((scores.argmax(1) != labels[rows]).sum())
        schedule.step()
        curve.append(wrong / len(images))
    return curve, _error(model, images, labels)


def _augmented(images: Images) -> Images:
    """A random crop of each image padded with zeros; half of them mirrored."""
    size = images.shape[2]
    padding = size // 8  # The paper's 4 of 32 pixels.
    padded = F.pad(images, [padding] * 4)
    tops, lefts = torch.randint(2 * padding + 1, (2, len(images))).tolist()
    flips = (torch.rand(len(images)) < 0.5).tolist()
    crops = [
        image[:, top : top + size, left : left + size].flip(2 if flip else [])
        for image, top, left, flip in zip(padded, tops, lefts, flips, strict=True)
    ]
    return torch.stack(crops).to(memory_format=torch.channels_last)


@torch.no_grad()
def _error(model: nn.Module, images: Images, labels: Labels) -> float:
    model.eval()
    wrong = sum(
        int((model(part).argmax(1) != truth).sum())
        for part, truth in zip(images.split(500), labels.split(500), strict=True)
    )
    return wrong / len(images)


def read_images(folder: Path, most: int, size: int) -> tuple[Images, Labels]:
    """The first `most` training images, less their mean, each channel over its standard deviation."""
    files = sorted(folder.glob("train-*.parquet"))
    if not files:
        sys.exit(f"{folder} holds no train-*.parquet; give the folder of CIFAR-10's Parquet files")
    tables = (pq.read_table(file, columns=["image", "label"]) for file in files)
    rows = list(itertools.islice((row for table in tables for row in table.to_pylist()), most))
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]))) for row in rows])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    images = F.adaptive_avg_pool2d(images, size)
    images = (images - images.mean(0)) / images.std((0, 2, 3), keepdim=True)
    return images.to(memory_format=torch.channels_last), torch.tensor([row["label"] for row in rows])


def draw(curves: dict[tuple[str, int], list[list[float]]], path: Path) -> None:
    """Plain nets on the left, residual ones on the right; each line is the mean over the seeds."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True, layout="constrained")
    for panel, (family, title) in zip(panels, _FAMILIES.items(), strict=True):
        for (kind, depth), runs in curves.items():
            if kind == family:
                mean = 100 * np.mean(runs, axis=0)
                panel.plot(range(1, len(mean) + 1), mean, label=f"{depth} layers")
        panel.set(title=f"{title} nets", xlabel="epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].set_ylabel("training error, %")
    figure.savefig(path, dpi=120)


def _measure(
    name: str, images: Images, labels: Labels, arguments: argparse.Namespace
) -> tuple[list[list[float]], str]:
    """The curve of each seed, and the error at the end as text."""
    started = time.process_time()
    runs = [train(name, images, labels, arguments, seed) for seed in range(arguments.seeds)]
    errors = 100 * np.array([error for _, error in runs])
    spread = f" ({errors.min():.1f} to {errors.max():.1f})" if len(runs) > 1 else ""
    seconds = time.process_time() - started
    return [curve for curve, _ in runs], f"{errors.mean():.1f} %{spread}, {seconds:.0f} s of CPU time"


def main() -> None:
    """Train all nets, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cifar", type=Path, help="folder of CIFAR-10's Parquet files")
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 20, 44])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, default=16, help="side of an image in pixels")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each net")
    parser.add_argument("--picture", type=Path, help="write the curves there, as PNG")
    add_device_option(parser)
    arguments = parser.parse_args()
    device = chosen_device(arguments.device)
    read = read_images(arguments.cifar, arguments.images, arguments.size)
    images, labels = (part.to(device) for part in read)
    print(f"{describe(device, 'torch')}; {len(images):,} images")
    curves: dict[tuple[str, int], list[list[float]]] = {}
    for family, title in _FAMILIES.items():
        for depth in arguments.depths:
            curves[family, depth], said = _measure(f"{family}{depth}", images, labels, arguments)
            print(f"  {title:<8} {depth:>4} layers: training error {said}", flush=True)
    if arguments.picture:
        draw(curves, arguments.picture)


if __name__ == "__main__":
    main()
