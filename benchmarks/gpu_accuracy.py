"""gpu.py's section `accuracy`: simclr-cifar10-resnet18 as it is shipped, as many epochs as there is time for.

In one process, without Ray: steps, views and evaluations are those of `diptych train`. How many epochs fit is
found by a few steps and one evaluation; a run that has to stop before its end keeps what it has, and goes on
when the section is called again with the same --runs. Judged by kNN and by a linear probe on the test images.
"""

import shutil
import statistics
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import Report, Setting
from pipelines import storage
from pipelines.reader import ahead, read_windows
from pipelines.sources import build_index
from training.checkpoint import Checkpoints
from training.config import ProbeConfig, TrainConfig, shipped_config
from training.evaluator import Sets
from training.faults import StoppedError
from training.gather import LocalGather
from training.metrics import read_metrics
from training.process import Worker
from training.protocols import Protocol
from training.record import claim_run, read_config
from training.run import make_plan, run_uri, total_steps, train

_NAME = "simclr-cifar10-resnet18"

# lightly's published kNN accuracy after 200 epochs, in per cent.
_PUBLISHED = 84.7

# Of the section's time, what is left for the judgement at the end; and what of it is planned with.
_JUDGED_SHARE, _PLANNED_SHARE = 0.12, 0.9
_PROBE_STEPS, _PROBE_WARM_UP = 80, 20
_EVALUATIONS = 10


def run(setting: Setting, report: Report) -> None:
    """Train, judge, and draw."""
    if setting.cifar10 is None or not setting.cifar10.is_dir():
        report.skip("accuracy", "no folder of CIFAR-10 was given")
        return
    config = _config(setting)
    sets = Sets.of(
        config, *(build_index(uri, config.data) for uri in (config.data.train, config.data.test or ""))
    )
    stop_at = time.monotonic() + report.left * (1 - _JUDGED_SHARE)
    if (Path(config.output) / config.name / "config.toml").is_file():
        config = read_config(run_uri(config))
        report.say(f"  goes on from step {_step(config)} of {_steps(config, sets)}, {config.epochs} epochs")
    else:
        config = _planned(config, sets, setting, stop_at, report)
        claim_run(run_uri(config), config)
    report.note("config", epochs=config.epochs, batch_size=config.batch_size, steps=_steps(config, sets))
    _train(config, sets, setting, stop_at, report)
    _keep(config, setting, report)
    with report.part("judgement"):
        _judge(config, sets, setting, report)
    _draw(config, setting, report)


def _config(setting: Setting) -> TrainConfig:
    values: dict[str, Any] = tomllib.loads(shipped_config(_NAME).read_text())
    values["data"] |= {"train": f"{setting.cifar10}/train-*", "test": f"{setting.cifar10}/test-*"}
    values |= {"name": _NAME, "output": str(setting.runs), "epochs": setting.epochs}
    if setting.small:
        values["data"]["train"] = f"{setting.cifar10}/train-00000*"
        values |= {"batch_size": 256, "encoder": {"name": "resnet8"}, "steps": 8}
        values["evaluation"] = {"train_images": 512, "test_images": 256, "diagnostic_images": 0}
    return TrainConfig(**values)


def _worker(setting: Setting, stop_at: float | None = None) -> Worker:
    return Worker(
        gather=LocalGather(),
        device=setting.device,
        threads=setting.threads,
        tables=lambda index, data, windows: ahead(read_windows(index, data, windows)),
        stopping=lambda: stop_at is not None and time.monotonic() > stop_at,
    )


def _steps(config: TrainConfig, sets: Sets) -> int:
    return total_steps(config, make_plan(config, sets.train))


def _step(config: TrainConfig) -> int:
    return Checkpoints(run_uri(config), config.checkpoint.keep).latest_step() or 0


def _planned(
    config: TrainConfig, sets: Sets, setting: Setting, stop_at: float, report: Report
) -> TrainConfig:
    """The config with as many epochs as there is time for, by the time that some steps take."""
    probe = replace(config, name="probe", steps=4 if setting.small else _PROBE_STEPS)
    shutil.rmtree(run_uri(probe), ignore_errors=True)
    started = time.monotonic()
    train(probe, sets, _worker(setting), lambda _: None)
    lines = [line for line in read_metrics(run_uri(probe)) if "loss" in line]
    rates = [line["images_per_second"] for line in lines][2 if setting.small else _PROBE_WARM_UP :]
    stepping = sum(config.batch_size / line["images_per_second"] for line in lines)
    # Before the first step and after the last.
    evaluation = (time.monotonic() - started - stepping) / 2
    shutil.rmtree(run_uri(probe))
    report.measured("images/s in a few steps", rates, "images/s", ",.0f")
    report.say(f"  an evaluation takes {evaluation:.1f} s at most")
    if setting.small:
        return config
    epoch = make_plan(config, sets.train).steps_per_epoch * config.batch_size / statistics.median(rates)
    time_left = (stop_at - time.monotonic()) * _PLANNED_SHARE - (_EVALUATIONS + 1) * evaluation
    epochs = max(1, min(config.epochs, int(time_left / epoch)))
    report.say(f"  an epoch takes {epoch:.1f} s: there is time for {epochs} of {config.epochs} epochs")
    return replace(
        config,
        epochs=epochs,
        evaluation=replace(config.evaluation, every_epochs=max(1, epochs // _EVALUATIONS)),
    )


def _train(config: TrainConfig, sets: Sets, setting: Setting, stop_at: float, report: Report) -> None:
    def show(values: dict[str, Any]) -> None:
        if "knn_top1" in values:
            report.say(f"  epoch {values['epoch']:>3}  kNN {values['knn_top1']:.2%}")

    steps = _steps(config, sets)
    if _step(config) < steps:
        try:
            train(config, sets, _worker(setting, stop_at), show)
        except StoppedError as stopped:
            report.say(
                f"  stopped after step {stopped.step} of {steps}; call again with --runs {setting.runs}"
            )
    lines = [line for line in read_metrics(run_uri(config)) if "images_per_second" in line]
    rates = [line["images_per_second"] for line in lines][2 if setting.small else _PROBE_WARM_UP :]
    if rates:
        report.measured("images/s, by steps", rates[-1000:], "images/s", ",.0f")
    waited = sum(line["data_wait_seconds"] for line in lines)
    spent = sum(config.batch_size / line["images_per_second"] for line in lines)
    report.say(f"  {spent:.0f} s in {len(lines)} steps, {waited / spent:.1%} of them waiting for data")
    report.note("time", seconds=spent, steps=len(lines), share_waiting=waited / spent)


def _keep(config: TrainConfig, setting: Setting, report: Report) -> None:
    """The run's own metrics beside the results."""
    content = storage.read(storage.join(run_uri(config), "metrics.jsonl")) or b""
    (setting.output / "accuracy-metrics.jsonl").write_bytes(content)
    report.say(f"  metrics: {setting.output / 'accuracy-metrics.jsonl'}")


def _judge(config: TrainConfig, sets: Sets, setting: Setting, report: Report) -> None:
    step = _step(config)
    probe = ProbeConfig(epochs=5, learning_rates=(0.1,)) if setting.small else ProbeConfig()
    for protocol in (
        Protocol(name="knn", step=step),
        Protocol(name="linear", step=step, probe=probe),
    ):
        found: dict[str, Any] = {}
        protocol(config, sets, _worker(setting), found.update)
        report.say(f"  {protocol.name} accuracy on the test images at step {step}: {found['top1']:.2%}")
        report.note(f"{protocol.name} accuracy", **found)
    report.say(
        f"  lightly's published kNN accuracy after 200 epochs: {_PUBLISHED} %; here {config.epochs} epochs"
    )
    report.note("published", knn_percent=_PUBLISHED, epochs=200)


def _draw(config: TrainConfig, setting: Setting, report: Report) -> None:
    """Loss and kNN accuracy by epoch, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(run_uri(config))
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 7), sharex=True)
    per_epoch = max(line["step"] for line in lines) / max(1, max(line["epoch"] for line in lines))
    losses = [(line["step"] / per_epoch, line["loss"]) for line in lines if "loss" in line]
    above.plot(*zip(*losses, strict=True), linewidth=0.5)
    above.set_ylabel("loss")
    for key, label in (("knn_top1", "kNN"), ("knn_top1_pixels", "kNN of raw pixels")):
        points = [(line["epoch"], 100 * line[key]) for line in lines if key in line]
        if points:
            below.plot(*zip(*points, strict=True), marker="o", label=label)
    below.axhline(_PUBLISHED, linestyle="--", color="grey", label="lightly, 200 epochs (published)")
    below.set_xlabel("epoch")
    below.set_ylabel("accuracy on the test images, %")
    below.legend()
    figure.suptitle(f"{_NAME}, {config.epochs} epochs")
    figure.tight_layout()
    figure.savefig(setting.output / "accuracy.png", dpi=120)
    pyplot.close(figure)
    report.say(f"  curve: {setting.output / 'accuracy.png'}")
