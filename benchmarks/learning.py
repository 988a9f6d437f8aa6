"""SimCLR on CIFAR-10, here and with lightly: kNN accuracy and time of the same training; and ablations.

    python benchmarks/learning.py CIFAR10                  # Parquet files train-*, test-*: image, label
    python benchmarks/learning.py CIFAR10 --ablations      # heads, jitter and temperature, diptych alone
    python benchmarks/learning.py CIFAR10 --orders --train 'train-*'   # stored by class against shuffled
    python benchmarks/learning.py CIFAR10 --train 'train-*' --device cuda --encoder resnet18 --stem cifar

The same encoder and projector, batch size, epochs, optimiser, schedule and augmentations, the same number of
images, and bfloat16 with CUDA; seeds 0 to 2, the two in turns. lightly is its SimCLRTransform in a DataLoader
with a worker process for each core and its NTXentLoss, in a plain PyTorch loop. Both encoders are judged by
diptych's kNN. Times are those of the training steps alone. Idle OpenMP threads sleep, for both.

--orders: images stored in the order of their classes, in row groups of 1,000, trained on as they are, with
windows of 1,024 images and with windows of the default size, and once packed; against the same images stored
in a random order.
"""

import argparse
import io
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # Before torch reads it.

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.comparison import Comparison, add_json_option, spread, write_json
from benchmarks.machine import CORES, add_device_option, chosen_device, describe, finish
from benchmarks.samples import read_images
from pipelines.config import DataConfig
from pipelines.index import build_index
from pipelines.mixing import run_mixing
from pipelines.packing import Order, Sizes, part_jobs, remove_parts, write_gathered, write_part
from pipelines.philox import derive_key, permutation
from pipelines.reader import ahead, read_windows
from training.config import TrainConfig
from training.evaluation.evaluator import Evaluator, Sets
from training.gather import LocalGather
from training.metrics import read_metrics
from training.models.encoders import build_encoder
from training.models.heads import build_projector
from training.optimizers import build_optimizer, learning_rate, peak_learning_rate
from training.process import Worker
from training.trainer import make_plan, run_uri, total_steps, train

_STRENGTH = 0.5


def _worker(device: torch.device) -> Worker:
    return Worker(
        gather=LocalGather(),
        device=device,
        threads=CORES,
        tables=lambda index, data, windows: ahead(read_windows(index, data, windows)),
    )


def _config(arguments: argparse.Namespace, output: str, seed: int, **fields: Any) -> TrainConfig:
    data = DataConfig(
        train=f"{arguments.cifar10}/{arguments.train}",
        test=f"{arguments.cifar10}/test-*",
        recipe="simclr-cifar",
        evaluation_crop=1.0,
        **fields.pop("data", {}),
    )
    settings: dict[str, Any] = {
        "name": f"seed{seed}",
        "temperature": 0.2,
        "encoder": {"name": arguments.encoder, "stem": arguments.stem},
        "projector": {"hidden_dim": 256, "dim": 64},
        "optimizer": {"name": "adamw", "learning_rate": 2e-3, "scaling": "none", "weight_decay": 1e-4},
        "evaluation": {"train_images": 10_000, "test_images": 5_000, "diagnostic_images": 0},
    }
    return TrainConfig(
        data=data, output=output, seed=seed, batch_size=arguments.batch_size, epochs=arguments.epochs,
        **(settings | fields),
    )  # fmt: skip


def _sets(config: TrainConfig) -> Sets:
    assert config.data.test
    indexes = [build_index(uri, config.data) for uri in (config.data.train, config.data.test)]
    return Sets.of(config, *indexes)


def _diptych(config: TrainConfig, device: torch.device) -> tuple[float, float]:
    """kNN accuracy, and the seconds of all steps but the first."""
    train(config, _sets(config), _worker(device), lambda _: None)
    lines = read_metrics(run_uri(config))
    steps = [line for line in lines if "loss" in line][1:]
    seconds = sum(config.batch_size / line["images_per_second"] for line in steps)
    return [line["knn_top1"] for line in lines if "knn_top1" in line][-1], seconds


class _Images(Dataset):
    """Views of encoded images, as lightly's users make them of a folder."""

    def __init__(self, encoded: list[bytes], transform: Any) -> None:
        self._encoded, self._transform = encoded, transform

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return self._transform(Image.open(io.BytesIO(self._encoded[index])).convert("RGB"))


def _lightly(config: TrainConfig, encoded: list[bytes], device: torch.device) -> tuple[float, float]:
    """kNN accuracy, and the seconds of all steps but the first, of a plain loop with lightly's parts."""
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform

    view = config.data.view
    transform = SimCLRTransform(
        input_size=view.size, cj_strength=_STRENGTH, gaussian_blur=0.0,
        normalize={"mean": list(view.mean), "std": list(view.std)},
    )  # fmt: skip
    loader = DataLoader(
        _Images(encoded, transform), config.batch_size, shuffle=True, drop_last=True, num_workers=CORES,
        persistent_workers=True, pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(config.seed),
    )  # fmt: skip
    torch.manual_seed(config.seed)
    torch.set_num_threads(CORES)
    encoder = build_encoder(config.encoder)
    model = torch.nn.Sequential(encoder, build_projector(config.projector, encoder.dim, config.objective))
    model.to(device)
    optimizer, criterion = build_optimizer(model, config.optimizer), NTXentLoss(config.temperature)
    sets = _sets(config)
    plan = make_plan(config, sets.train)
    steps, peak = total_steps(config, plan), peak_learning_rate(config)
    warmup = round(min(config.optimizer.warmup_epochs * plan.steps_per_epoch, steps / 10))
    started = 0.0
    for step, (first, second) in enumerate(itertools.islice(_forever(loader), steps)):
        if step == 1:
            started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=peak, steps=steps, warmup_steps=warmup)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            projections = model(torch.cat([first, second]).to(device, non_blocking=True))
        loss = criterion(*projections.float().chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    finish(device)
    seconds = time.perf_counter() - started
    return Evaluator(config, sets, _worker(device)).knn(encoder)["top1"], seconds


def _forever(loader: DataLoader) -> Iterator[Any]:
    while True:
        yield from loader


def _compare(arguments: argparse.Namespace, output: str, device: torch.device) -> list[Comparison]:
    encoded = list(read_images(Path(arguments.cifar10), arguments.train))
    found: dict[str, list[tuple[float, float]]] = {"diptych": [], "lightly": []}
    for seed in range(arguments.seeds):
        config = _config(arguments, output, seed)
        found["diptych"].append(_diptych(config, device))
        found["lightly"].append(_lightly(config, encoded, device))
        for name, results in found.items():
            print(f"seed {seed}  {name:<8} kNN {results[-1][0]:.1%}  {results[-1][1]:6.1f} s", flush=True)
    accuracies = {name: [accuracy for accuracy, _ in results] for name, results in found.items()}
    times = {name: [seconds for _, seconds in results] for name, results in found.items()}
    for name in found:
        print(f"{name:<8} kNN {spread(accuracies[name], '.1%')}, {spread(times[name], '.1f')} s")
    percent = [[100 * accuracy for accuracy in values] for values in accuracies.values()]
    learnt = Comparison("kNN after the same training", "lightly", "%", *percent, more_is_better=True)
    time_taken = Comparison("time of the same training", "lightly", "s", *times.values())
    print(f"lightly's time over diptych's: {spread(time_taken.ratios, '.2f')}")
    return [learnt, time_taken]


_ABLATIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "linear head": {"projector": {"kind": "linear", "dim": 64}},
    "no head": {"projector": {"kind": "none"}},
    "no colour jitter": {"data": {"view": {"jitter": 0.0}}},
    "temperature 0.1": {"temperature": 0.1},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 1": {"temperature": 1.0},
}


def _ablate(arguments: argparse.Namespace, output: str, device: torch.device) -> None:
    for name, fields in _ABLATIONS.items():
        configs = [
            replace(_config(arguments, output, seed, **fields), name=f"{name}-{seed}".replace(" ", "-"))
            for seed in range(arguments.seeds)
        ]
        accuracies = [_diptych(config, device)[0] for config in configs]
        print(f"{name:<18} kNN {spread(accuracies, '.1%')}", flush=True)


def _stored(arguments: argparse.Namespace, folder: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """The place and the data settings of the training images, by the way in which they are stored."""
    tables = [pq.read_table(path) for path in sorted(Path(arguments.cifar10).glob(arguments.train))]
    table = pa.concat_tables(tables)
    by_class, shuffled, packed = (f"{folder}/{name}" for name in ("by-class", "shuffled", "packed"))
    order = permutation(derive_key(0, 0), len(table))
    for place, rows in ((by_class, table.sort_by("label")), (shuffled, table.take(pa.array(order)))):
        Path(place).mkdir()
        pq.write_table(rows, f"{place}/train.parquet", row_group_size=1000)
    _pack(by_class, packed)
    return {
        "shuffled": (shuffled, {}),
        "packed": (packed, {}),
        "by class": (by_class, {}),
        "by class, windows of 1,024": (by_class, {"window_rows": 1024}),
    }


def _pack(source: str, dest: str) -> None:
    """As `diptych data pack` does, in this process."""
    data = DataConfig(train=source)
    index = build_index(source, data)
    size = Sizes.of(index.image_bytes, int(index.rows.sum()), shard=None, group=None, part=None)
    order = Order.of(0, int(index.rows.sum()), size.rows_per_shard)
    parts = [write_part(job, data, dest, order) for job in part_jobs(index, size.rows_per_part)]
    settings = {"labelled": True, "rows_per_group": size.rows_per_group, "classes": ()}
    for number in range(order.shards):
        write_gathered(number, dest, order, parts=len(parts), **settings)
    remove_parts(dest)


def _compare_orders(arguments: argparse.Namespace, output: str, device: torch.device) -> None:
    accuracies: dict[str, list[float]] = {}
    stored = _stored(arguments, output)
    for seed in range(arguments.seeds):
        for name, (place, settings) in stored.items():
            config = _config(arguments, output, seed, data=settings)
            data = replace(config.data, train=place)
            config = replace(config, data=data, name=f"{name}-{seed}".replace(" ", "-").replace(",", ""))
            accuracies.setdefault(name, []).append(_diptych(config, device)[0])
            index = _sets(config).train
            mixing = run_mixing(make_plan(config, index), index, data)
            print(f"seed {seed}  {name:<27} kNN {accuracies[name][-1]:.1%}  {mixing}", flush=True)
    for name, values in accuracies.items():
        print(f"{name:<27} kNN {spread(values, '.1%')}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cifar10", help="a folder of Parquet files train-* and test-*")
    parser.add_argument("--train", default="train-00000*", help="pattern of the training files")
    parser.add_argument("--encoder", default="resnet8")
    parser.add_argument("--stem", choices=["imagenet", "cifar"], help="encoder.stem of ImageNet ResNets")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--orders", action="store_true")
    add_device_option(parser)
    add_json_option(parser)
    arguments = parser.parse_args()
    if (arguments.ablations or arguments.orders) and arguments.json:
        parser.error("--json holds what is measured against a peer; --ablations and --orders have none")
    device = chosen_device(arguments.device)
    print(describe(device, "torch", "nvidia-dali-cuda130"))
    with tempfile.TemporaryDirectory() as output:
        if arguments.ablations:
            _ablate(arguments, output, device)
        elif arguments.orders:
            _compare_orders(arguments, output, device)
        else:
            write_json(arguments.json, _compare(arguments, output, device))


if __name__ == "__main__":
    main()
