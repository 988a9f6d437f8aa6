"""gpu.py's section `step`: a step of `diptych train` on photographs against the same step on data in memory.

The same networks, loss and optimiser three times, in turns: in a plain loop on views that are on the device;
as one worker runs, without Ray, from Parquet files; and as `diptych train` runs, with Ray. Times are those of
steps after the first few. The share of the peak is the encoder's FLOPs, forward and twice that backward for
both views, over what the device does in a large bfloat16 product, and by its data sheet.
"""

import gc
import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from benchmarks.gpu_machine import Utilisation, data_sheet_rate, installed, matrix_rate
from benchmarks.gpu_report import NEEDS_CUDA, Report, Setting
from benchmarks.gpu_trainer import Trainer, step_flops, step_seconds
from pipelines.config import DataConfig
from pipelines.reader import ahead, read_windows
from pipelines.shards import write_shards
from pipelines.sources import build_index
from training.config import TrainConfig
from training.gather import LocalGather

_ENCODERS = ("resnet50", "efficientnet-b0")

# Images on disk, from which an epoch is made, and steps of a turn.
_IMAGES, _STEPS, _WARM_UP = 4096, 50, 20
_SMALL_IMAGES, _SMALL_STEPS, _SMALL_WARM_UP = 64, 3, 1

# What a turn may take at most, start-up included; compiling included.
_TURN_SECONDS, _COMPILED_SECONDS = 45.0, 120.0


def run(setting: Setting, report: Report) -> None:
    """Both encoders as they are, and then compiled."""
    if setting.photographs is None or not setting.photographs.is_dir():
        report.skip("step", "no folder of photographs was given")
        return
    kind = "bfloat16" if setting.device.type == "cuda" else "float32"
    rate = matrix_rate(setting.device, kind, small=setting.small)
    report.say(f"  a large product in {kind}: {rate / 1e12:,.2f} TFLOP/s; batches of {setting.batch_size}")
    report.note(f"product in {kind}", flops_per_second=rate, data_sheet=data_sheet_rate(setting.device, kind))
    with tempfile.TemporaryDirectory() as folder:
        _pack(setting.photographs, folder, _SMALL_IMAGES if setting.small else _IMAGES)
        for compiled, encoder in itertools.product((False, True), _ENCODERS):
            what = f"compiled {encoder}" if compiled else encoder
            if compiled and setting.device.type != "cuda":
                report.skip(what, NEEDS_CUDA)
                continue
            with report.part(what):
                _Case(what, encoder, compiled, folder, rate, setting, report).compare()


def _pack(photographs: Path, folder: str, images: int) -> None:
    """As many rows, the photographs coming round, as `diptych data pack` would write them."""
    tables = [pq.read_table(file, columns=["image"]) for file in sorted(photographs.glob("*.parquet"))]
    rows = [
        row["bytes"] if isinstance(row, dict) else row
        for table in tables
        for row in table["image"].to_pylist()
    ]
    if not rows:
        raise ValueError(f"{photographs} holds no Parquet files with images")
    named = ((rows[n % len(rows)], 0, f"image {n}") for n in range(images))
    write_shards(named, f"{folder}/train", rows_per_shard=512, rows_per_group=64)


class _Case:
    """One encoder, compiled or not: its turns, and what is said of them."""

    def __init__(
        self,
        what: str,
        encoder: str,
        compiled: bool,
        folder: str,
        rate: float,
        setting: Setting,
        report: Report,
    ) -> None:
        self._what, self._encoder, self._compiled, self._folder = what, encoder, compiled, folder
        self._rate, self._setting, self._report = rate, setting, report
        self._size = 64 if setting.small else 224
        self._steps, self._warm_up = (
            (_SMALL_STEPS, _SMALL_WARM_UP) if setting.small else (_STEPS, _WARM_UP)
        )  # fmt: skip

    def compare(self) -> None:
        """In turns, as often as there is time for; each turn's median goes into the ratios."""
        turns: dict[str, list[float]] = {}
        works = {
            "plain PyTorch": self._plain,
            "a worker without Ray": self._worker,
            "diptych train": self._train,
        }
        expected = 0.0 if self._setting.small else _COMPILED_SECONDS if self._compiled else _TURN_SECONDS
        rounds = 1 if self._setting.small or self._compiled else 2
        for number, (name, work) in itertools.product(range(rounds), works.items()):
            what = f"{self._what}, {name}"
            if (number and self._report.left < expected) or not self._report.has_time(what, expected):
                continue
            with self._report.part(what):
                rates = work(what, number)
                if rates:
                    self._tell(what, rates)
                    turns.setdefault(name, []).append(statistics.median(rates))
            gc.collect()
            if self._setting.device.type == "cuda":
                torch.cuda.empty_cache()  # The next one may be another process.
        self._compared(turns)

    def _tell(self, what: str, rates: list[float]) -> None:
        flops = step_flops(self._encoder, self._size) * statistics.median(rates)
        self._report.measured(what, rates, "images/s", ",.0f")
        sheet = data_sheet_rate(self._setting.device, "bfloat16")
        shares = {"of a large product": flops / self._rate} | (
            {"by data sheet": flops / sheet} if sheet else {}
        )
        said = ", ".join(f"{share:.1%} {name}" for name, share in shares.items())
        self._report.say(f"    {flops / 1e12:,.2f} TFLOP/s of the encoder: {said}")
        self._report.note(f"{what}, share of the peak", flops_per_second=flops, shares=shares)

    def _compared(self, turns: dict[str, list[float]]) -> None:
        for name in turns.keys() - {"plain PyTorch"}:
            ratios = [mine / plain for mine, plain in zip(turns[name], turns["plain PyTorch"], strict=False)]
            self._report.measured(f"{self._what}, {name} over plain", ratios, "of its images/s", ".3f")

    def _plain(self, _what: str, _number: int) -> list[float]:
        trainer = Trainer(self._encoder, self._setting.device, self._compiled)
        batch_size = self._setting.batch_size
        seconds = step_seconds(
            trainer, batch_size, self._size, steps=self._steps, warm_up=self._warm_up
        )  # fmt: skip
        return [batch_size / each for each in seconds]

    def _config(self, name: str) -> TrainConfig:
        data = DataConfig(train=f"{self._folder}/train", recipe="simclr", view={"size": self._size})  # pyright: ignore[reportArgumentType]
        settings: dict[str, Any] = {
            "encoder": {"name": self._encoder},
            "evaluation": {"diagnostic_images": 0},
            "checkpoint": {"every_steps": 10**6},
        }
        return TrainConfig(
            data=data, output=f"{self._folder}/runs", name=name, workers=1, compile=self._compiled,
            batch_size=self._setting.batch_size, steps=self._steps + self._warm_up, **settings,
        )  # fmt: skip

    def _worker(self, what: str, number: int) -> list[float]:
        if not installed("nvidia.dali"):
            self._report.skip(what, "needs nvidia.dali, which is not installed")
            return []
        from training.evaluator import Sets
        from training.metrics import read_metrics
        from training.process import Worker
        from training.run import run_uri, train

        config = self._config(f"{self._encoder}-{self._compiled}-alone-{number}")
        worker = Worker(
            gather=LocalGather(),
            device=self._setting.device,
            threads=self._setting.threads,
            tables=lambda index, data, windows: ahead(read_windows(index, data, windows)),
        )
        with Utilisation() as utilisation:
            train(config, Sets(build_index(config.data.train, config.data)), worker, lambda _: None)
        return self._rates(what, read_metrics(run_uri(config)), utilisation)

    def _train(self, what: str, number: int) -> list[float]:
        if missing := [name for name in ("ray", "nvidia.dali") if not installed(name)]:
            self._report.skip(what, f"needs {missing[0]}, which is not installed")
            return []
        from cluster.train import run_training

        config = self._config(f"{self._encoder}-{self._compiled}-ray-{number}")
        with Utilisation() as utilisation:
            lines = run_training(config)
        return self._rates(what, lines, utilisation)

    def _rates(self, what: str, lines: list[dict[str, Any]], utilisation: Utilisation) -> list[float]:
        """Images a second of the steps after the warm-up; prints where their time went."""
        lines = [line for line in lines if "loss" in line][self._warm_up :]
        seconds = sum(self._setting.batch_size / line["images_per_second"] for line in lines)
        stages = [key for key in lines[-1] if key.endswith("_seconds")]
        shares = {key[:-8]: sum(line.get(key, 0.0) for line in lines) / seconds for key in stages}
        said = ", ".join(f"{stage} {share:.1%}" for stage, share in shares.items())
        self._report.say(f"    {what}: {said}; nvidia-smi, medians: {utilisation.medians or NEEDS_CUDA}")
        self._report.note(f"{what}, shares", shares=shares, utilisation=utilisation.medians)
        return [line["images_per_second"] for line in lines]
