"""gpu.py's section `views`: from encoded bytes in memory to two views, what bounds it, and who waits.

Stages alone, at the batch of the steps: NumPy's draws, decoding, decoding and crops, effects on crops that
are there, and all together. Then a ResNet-50's step on views that are there, and on fresh ones through `fit`,
whose `data_wait` is what the goal of 5 % is about. At last variants of what DALI is told.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.gpu_machine import Utilisation
from benchmarks.gpu_pipelines import Batches, crops, decoded, made, two_halves, two_singles
from benchmarks.gpu_report import NEEDS_CUDA, Report, Setting, finished, in_turns
from benchmarks.gpu_trainer import Trainer, step_seconds
from pipelines.finisher import Finisher
from pipelines.views import Views
from training.loop import fit
from training.stages import Stages

_GOAL = 0.05
_ENCODER = "resnet50"
_BATCHES, _SMALL_BATCHES = (64, 128, 256, 512), (8, 16)
_ROUND_SECONDS = 1.0
_MOST_AHEAD = 4


def run(setting: Setting, report: Report) -> None:
    """Stages, variants, and steps on fresh views."""
    if setting.photographs is None or not setting.photographs.is_dir():
        report.skip("views", "no folder of photographs was given")
        return
    images = _images(setting.photographs, 4096)
    mean = statistics.mean(len(image) for image in images)
    report.say(f"  {len(images)} photographs of {mean / 1e3:,.0f} kB; batches of {setting.batch_size}")
    batches = Batches(images, setting.batch_size, 64 if setting.small else 224)
    found: dict[str, float] = {}
    for name, part in (("stages", _stages), ("steps", _steps), ("variants", _variants)):
        if report.has_time(name, 0 if setting.small else 20):
            with report.part(name):
                part(batches, found, setting, report)
            gc.collect()  # Pipelines hold gigabytes of a GPU, and themselves.
    if {"step alone", "all, as it is"} <= found.keys():
        _verdict(found, report)


def _images(folder: Path, most: int) -> list[bytes]:
    rows = (
        row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file)["image"].to_pylist()
    )
    found = [row["bytes"] if isinstance(row, dict) else row for row in itertools.islice(rows, most)]
    if not found:
        raise ValueError(f"{folder} holds no Parquet files with images")
    return found


def _stages(batches: Batches, found: dict[str, float], setting: Setting, report: Report) -> None:
    report.say("  each stage alone, images/s:")
    place = {"gpu": setting.gpu, "threads": setting.threads}
    works: dict[str, Callable[[], object]] = {
        "NumPy's draws and arguments": partial(next, batches.arguments()),
        "decoding": decoded(batches, **place),
        "decoding and crops": crops(batches, **place),
        "effects on crops": _effects(batches, setting),
        "all, as it is": partial(next, made(batches, **place)),
    }
    _race(works, batches.size, found, setting, report)


def _race(
    works: dict[str, Callable[[], object]],
    images: int,
    found: dict[str, float],
    setting: Setting,
    report: Report,
) -> None:
    """Their images a second, in turns, printed and put into `found`."""
    rounds = max(1, min(setting.rounds, int(report.left / 3 / len(works) / _ROUND_SECONDS)))
    seconds = 0.0 if setting.small else _ROUND_SECONDS
    # What was made ahead while others had their turn does not count.
    turns = in_turns(works, setting.device, rounds=rounds, seconds=seconds, first=_MOST_AHEAD + 1)
    for name, each in turns.items():
        rates = [images / one for one in each]
        report.measured(name, rates, "images/s", ",.0f", batch_size=images)
        found.setdefault(name, statistics.median(rates))


def _effects(batches: Batches, setting: Setting) -> Callable[[], object]:
    request = batches.request(0)
    shape = (batches.size, batches.side, batches.side, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    fixed = [torch.from_numpy(pixels).to(setting.device)] * len(batches.recipes)
    finisher = Finisher(batches.recipes, setting.threads, setting.gpu)
    return lambda: finisher.finish(fixed, request.draws)


def _steps(batches: Batches, found: dict[str, float], setting: Setting, report: Report) -> None:
    """What the networks take of views that are there, and get of fresh ones."""
    for compiled in (False, True):
        name = "compiled step" if compiled else "step"
        if compiled and setting.device.type != "cuda":
            report.skip(name, NEEDS_CUDA)
        elif report.has_time(name, 90 if compiled else 0):
            with report.part(name):
                _step(name, compiled, batches, found, setting, report)


def _step(
    name: str, compiled: bool, batches: Batches, found: dict[str, float], setting: Setting, report: Report
) -> None:
    stages = Stages()
    trainer = Trainer(_ENCODER, setting.device, compiled, stages)
    steps, warm_up = (2, 1) if setting.small else (20, 5)
    seconds = step_seconds(trainer, batches.size, batches.side, steps=steps, warm_up=warm_up)
    rates = [batches.size / each for each in seconds]
    report.measured(f"{name} alone", rates, "images/s", ",.0f", encoder=_ENCODER)
    found[f"{name} alone"] = statistics.median(rates)
    stages.take()
    found[f"{name} on fresh views"] = _fitted(trainer, f"{name} on fresh views", batches, setting, report)


def _fitted(trainer: Trainer, name: str, batches: Batches, setting: Setting, report: Report) -> float:
    """Images a second; prints the shares of a step's time."""
    steps, warm_up = (3, 1) if setting.small else (40, 10)
    spent: list[dict[str, float]] = []
    ends: list[float] = []
    stages = trainer.stages

    def after_step(*_: Any) -> None:
        finished(setting.device)
        spent.append(stages.take())
        ends.append(time.perf_counter())

    with Utilisation() as utilisation:
        fit(
            trainer.model,
            trainer.backward,
            trainer.optimizer,
            _views(batches, setting),
            start_step=0,
            stop_step=steps + warm_up,
            rate=lambda _: 0.01,
            after_step=after_step,
            device=setting.device,
            stages=stages,
        )
    seconds = np.diff(ends)[warm_up - 1 :].tolist()
    shares = {
        key.removesuffix("_seconds"): sum(each[key] for each in spent[warm_up:]) / sum(seconds)
        for key in sorted(spent[-1])
    }
    rates = [batches.size / each for each in seconds]
    report.measured(name, rates, "images/s", ",.0f")
    report.say("    " + ", ".join(f"{stage} {share:.1%}" for stage, share in shares.items()))
    report.say(f"    nvidia-smi, medians: {utilisation.medians or NEEDS_CUDA}")
    kept = "kept" if shares["data_wait"] <= _GOAL else "missed"
    report.say(f"    waiting for data {shares['data_wait']:.1%} of the time; goal of {_GOAL:.0%} {kept}")
    report.note(f"{name}, shares", shares=shares, utilisation=utilisation.medians, goal=kept)
    return statistics.median(rates)


def _views(batches: Batches, setting: Setting) -> Iterator[Views]:
    labels, samples = torch.full((batches.size,), -1), np.arange(batches.size)
    for images, _ in made(batches, gpu=setting.gpu, threads=setting.threads):
        yield Views(images, labels, samples)


def _variants(batches: Batches, found: dict[str, float], setting: Setting, report: Report) -> None:
    """What DALI could be told; as it is comes again in each race, to compare within it."""
    place = {"gpu": setting.gpu, "threads": setting.threads}
    as_it_is = {"decoding and crops": crops(batches, **place)}
    report.say("  decoding, by who decodes and how colours are scaled up:")
    if setting.gpu is None:
        report.skip("hw_decoder_load, jpeg_fancy_upsampling", NEEDS_CUDA)
    else:
        options: Sequence[dict[str, Any]] = [
            {}, {"hw_decoder_load": 0.0}, {"hw_decoder_load": 0.9}, {"hw_decoder_load": 1.0},
            {"jpeg_fancy_upsampling": False}, {"jpeg_fancy_upsampling": False, "hw_decoder_load": 1.0},
        ]  # fmt: skip
        works = {f"decoding, {_named(each)}": decoded(batches, **place, **each) for each in options}
        _race(works, batches.size, found, setting, report)
        cores = {"views on the CPU's cores, copied": _copied(batches, setting)}
        _race(
            cores | {"all, as it is": partial(next, made(batches, **place))},
            batches.size,
            found,
            setting,
            report,
        )
    report.say("  crops, by batches that are worked on ahead:")
    depths = {f"{n} ahead": crops(batches, **place, prefetch=n) for n in range(1, _MOST_AHEAD + 1)}
    _race(depths, batches.size, found, setting, report)
    report.say("  crops, by pipelines:")
    several = {
        "two pipelines, each of half the images": two_halves(batches, **place),
        "two pipelines, each of one view (decoded twice)": two_singles(batches, **place),
    }
    _race(as_it_is | several, batches.size, found, setting, report)
    report.say("  crops, by images in a batch:")
    for size in _SMALL_BATCHES if setting.small else _BATCHES:
        if report.has_time(f"batches of {size}", 5):
            other = Batches(batches.images, size, batches.side)
            _race({f"batches of {size}": crops(other, **place)}, size, {}, setting, report)


def _named(options: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items()) or "as it is"


def _copied(batches: Batches, setting: Setting) -> Callable[[], object]:
    views = made(batches, gpu=None, threads=setting.threads)
    return lambda: [view.to(setting.device, non_blocking=True) for view in next(views)[0]]


def _verdict(found: dict[str, float], report: Report) -> None:
    """Which stage has the least room above what the steps take."""
    step = max(found[name] for name in ("step alone", "compiled step alone") if name in found)
    alone = (
        "NumPy's draws and arguments",
        "decoding",
        "decoding and crops",
        "effects on crops",
        "all, as it is",
    )
    rates = {name: found[name] for name in alone if name in found}
    slowest = min((name for name in rates if name != "all, as it is"), key=lambda name: rates[name])
    report.say(f"  slowest stage alone: {slowest}, {rates[slowest]:,.0f} images/s")
    report.say(f"  views alone make {rates['all, as it is'] / step:.2f} of what the faster step takes")
    report.note("verdict", slowest=slowest, views_over_step=rates["all, as it is"] / step, rates=rates)
