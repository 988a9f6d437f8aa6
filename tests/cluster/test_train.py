"""diptych train, the whole way: S3 to Ray Data to DALI to Ray Train and back to S3."""

import io
import json
import os
import shutil
import stat
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pool import Pool

from cluster.cli.main import app, main
from cluster.digits import scattered_digits
from cluster.evaluate import run_evaluation
from cluster.objectstore import S3Server
from cluster.train import run_training
from pipelines import storage
from pipelines.index import Index, build_index
from pipelines.shards import write_shards
from pipelines.storage.checksums import read_lines
from training.config import TrainConfig
from training.evaluation.evaluator import Evaluator, Sets
from training.metrics import Progress
from training.models.encoders import raw_pixels
from training.process import Worker
from training.ray_train.launch import Launch
from training.ray_train.worker import Task

pytestmark = pytest.mark.ray

STEPS = 6
IMAGES = 400

SMALL = {
    "--data.recipe": "simclr-cifar",
    "--encoder.name": "resnet8",
    "--projector.hidden-dim": "64",
    "--projector.dim": "32",
    "--batch-size": "48",
    "--lanes": "4",
    # Gentle, so that rounding grows by little from step to step.
    "--optimizer.name": "sgd",
    "--optimizer.learning-rate": "0.02",
    "--temperature": "1.0",
}


def small_run(train: str, output: str, **flags: str | int | float) -> list[str]:
    """A `diptych train` of the settings above; flags are added or take their place."""
    given = {f"--{name.replace('_', '-').replace('--', '.')}": str(value) for name, value in flags.items()}
    options = SMALL | {"--data.train": train, "--output": output} | given
    return ["train", *(word for option in options.items() for word in option)]


@pytest.fixture(scope="module")
def images(bucket: str) -> str:
    """Digits as Parquet shards in the bucket."""
    for split, count, held_out in (("train", IMAGES, False), ("test", 100, True)):
        rows = scattered_digits(count, held_out=held_out, seed=1)
        write_shards(rows, f"{bucket}/digits/{split}", rows_per_shard=150, rows_per_group=60)
    return f"{bucket}/digits"


def command(images: str, output: str, name: str, **flags: str | int | float) -> list[str]:
    """A run of some steps on the digits."""
    settings = {
        "name": name,
        "data__test": f"{images}/test",
        "data__window_rows": 32,
        "steps": STEPS,
        "seed": 3,
    }
    return small_run(f"{images}/train", output, **(settings | flags))


def config_of(arguments: list[str]) -> TrainConfig:
    """The config that the command makes of its flags."""
    return app.parse_args(arguments)[1].arguments["run"]


def metrics(run: str) -> list[dict]:
    content = storage.read(f"{run}/metrics.jsonl")
    assert content is not None
    return [json.loads(line) for line in content.decode().splitlines()]


def losses(lines: Iterable[dict]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def runs(pool: Pool, images: str, bucket: str) -> dict[int, list[dict]]:
    """The same config on one worker of the pool, and on two by the command; from S3 and to S3."""
    output = f"{bucket}/runs"
    run_training(config_of(command(images, output, "workers1", workers=1)), launch=pool.launch)
    main(command(images, output, "workers2", workers=2))
    return {workers: metrics(f"{output}/workers{workers}") for workers in (1, 2)}


def test_loss_is_the_same_on_one_worker_and_on_two(runs: dict[int, list[dict]]) -> None:
    alone, together = (losses(runs[count]) for count in (1, 2))
    assert len(alone) == STEPS
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_untrained_accuracy_is_the_same_on_one_worker_and_on_two(runs: dict[int, list[dict]]) -> None:
    alone, together = (next(line for line in runs[count] if "knn_top1" in line) for count in (1, 2))
    alone, together = ({**line, "crc32": None} for line in (alone, together))  # Of the line's own digits.
    assert together == pytest.approx(alone, rel=1e-5)


def test_metrics_have_each_step_once_and_an_evaluation_at_either_end(runs: dict[int, list[dict]]) -> None:
    lines = runs[2]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    stages = {f"{stage}_seconds" for stage in ("data_wait", "forward", "gather", "backward", "optimizer")}
    assert all(
        set(line)
        == {"step", "epoch", "loss", "learning_rate", "images_per_second", "view_matching", "crc32"} | stages
        for line in steps
    )
    assert [line["step"] for line in lines if "knn_top1" in line] == [0, STEPS]


def test_run_in_the_bucket_is_complete(runs: dict[int, list[dict]], bucket: str) -> None:
    run = f"{bucket}/runs/workers2"
    assert {"config.toml", "metrics.jsonl", "report.html", "views.png"} <= set(storage.names(run))
    assert storage.names(f"{run}/index") == ["test.parquet", "train.parquet"]
    assert storage.names(f"{run}/checkpoints") == [f"step-{STEPS:09}.pt"]
    config = tomllib.loads((storage.read(f"{run}/config.toml") or b"").decode())
    assert config["workers"] == 2
    assert config["data"]["view"]["size"] == 32


def test_a_run_in_the_bucket_is_judged_and_the_result_kept(
    runs: dict[int, list[dict]], pool: Pool, bucket: str
) -> None:
    run = f"{bucket}/runs/workers2"
    flags = ["--protocol", "linear", "--labels", "0.5", "--probe.epochs", "5", "--workers", "2"]
    request = app.parse_args(["eval", run, *flags])[1].arguments["request"]
    said = run_evaluation(run, request, launch=pool.launch)
    assert read_lines(f"{run}/evaluations.jsonl") == [said]
    assert (said["protocol"], said["step"], said["labels"]) == ("linear", STEPS, 0.5)
    assert 0 < said["top1"] < 1


def test_a_run_is_fine_tuned_in_a_run_of_its_own_and_the_result_kept(
    runs: dict[int, list[dict]], pool: Pool, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"{bucket}/runs/workers1"
    arguments = ["eval", run, "--protocol", "finetune", "--labels", "0.5", "--finetune.epochs", "2"]
    request = app.parse_args(arguments)[1].arguments["request"]
    found = run_evaluation(run, request, launch=pool.launch)
    assert read_lines(f"{run}/evaluations.jsonl")[-1] == found
    assert (found["protocol"], found["step"], found["labels"]) == ("finetune", STEPS, 0.5)
    assert found["run"].startswith(f"{run}/finetune/labels-0.5-")
    tuned = tomllib.loads((storage.read(f"{found['run']}/config.toml") or b"").decode())
    assert tuned["init"] == f"{run}/checkpoints/step-{STEPS:09}.pt"
    assert (tuned["objective"], tuned["data"]["recipe"]) == ("supervised", "supervised")
    lines = metrics(found["run"])
    first = next(line for line in lines if "knn_top1" in line)
    assert first["step"] == 0
    assert first["knn_top1"] > 0
    assert found["top1"] == [line["top1"] for line in lines if "top1" in line][-1]
    main(arguments)  # A second time there is nothing to train.
    shown = capsys.readouterr().out
    assert "is finished" in shown
    assert f"with 50% of the labels: {found['top1']:.2%}" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["workers1", "--protocol", "finetune", "--features", "projector"], "has no effect with protocol"),
        (["nowhere"], "nowhere is not a run: it has no config.toml"),
        (["workers1", "--checkpoint", "5"], "has no checkpoint of step 5; it has 6"),
        (["workers1", "--labels", "1.5"], "labels=1.5: Input should be less than or equal to 1"),
        (["workers1", "--test", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_an_evaluation_that_cannot_be_is_one_line(
    runs: dict[int, list[dict]],
    bucket: str,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["eval", f"{bucket}/runs/{arguments[0]}", *arguments[1:]])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_finished_run_is_left_as_it_is(
    runs: dict[int, list[dict]], images: str, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command(images, f"{bucket}/runs", "workers2", workers=2))
    assert metrics(f"{bucket}/runs/workers2") == runs[2]
    assert "is finished: 6 steps" in capsys.readouterr().out


def test_another_config_is_refused_by_its_fields(
    runs: dict[int, list[dict]], images: str, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(command(images, f"{bucket}/runs", "workers2", workers=2, seed=4, optimizer__momentum=0.8))
    assert stopped.value.code == 2
    assert "other values of optimizer.momentum, seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"workers": 8}, "workers=8 need 16 CPUs of the cluster, which has 15; try --workers 4"),
        ({"workers": 2, "cpus_per_worker": 8}, "workers=2 need 16 CPUs of the cluster, which has 15"),
        (
            {"gpus_per_worker": 0.5},
            "need 0.5 GPUs of the cluster, which has 0; leave out gpus_per_worker",
        ),
    ],
)
def test_more_than_the_cluster_holds_is_refused(
    flags: dict[str, float],
    message: str,
    ray_cluster: None,
    images: str,
    bucket: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(command(images, f"{bucket}/runs", "many", lanes=8, **flags))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_data_without_a_good_image_ends_in_one_line_that_names_the_file(
    ray_cluster: None, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards([(b"no image", 0, "a")] * 100, f"{bucket}/broken", rows_per_shard=100, rows_per_group=100)
    with pytest.raises(SystemExit) as stopped:
        main(small_run(f"{bucket}/broken", f"{bucket}/runs", name="broken", batch_size=8, steps=1))
    message = str(stopped.value.code)
    assert "a of diptych-tests/broken/00000.parquet: no image in a known format" in message
    assert b"Traceback" in (storage.read(f"{bucket}/runs/broken/error.log") or b"")


# Windows of one step, so that Ray Data starts on a new part of the stream, and reads again, in mid-run.
_OUTAGE_STEPS, _OUTAGE_SECONDS = 90, 20


def _long(images: str, output: Path, name: str, launch: Launch) -> list[float]:
    """Losses of a run that is long enough to be caught in the middle."""
    settings = {"data__window_rows": 12, "workers": 1, "steps": _OUTAGE_STEPS, "checkpoint__every_steps": 10}
    arguments = small_run(f"{images}/train", str(output), name=name, **settings)
    return losses(run_training(config_of(arguments), launch=launch))


@pytest.mark.slow
def test_a_run_outlives_a_storage_that_is_away_for_a_while(
    pool: Pool, s3: S3Server, images: str, tmp_path: Path
) -> None:
    undisturbed = _long(images, tmp_path, "undisturbed", pool.launch)
    away: list[int] = []

    def outage() -> None:
        checkpoints = tmp_path / "caught" / "checkpoints"
        while not (checkpoints / "step-000000010.pt").exists():
            time.sleep(0.05)
        s3.stop()
        before = _last_step(checkpoints)
        time.sleep(_OUTAGE_SECONDS)
        away.extend([before, _last_step(checkpoints)])
        s3.start()

    thread = Thread(target=outage)
    thread.start()
    try:
        caught = _long(images, tmp_path, "caught", pool.launch)
    finally:
        thread.join()
    # While the storage was away the run used up what was read ahead, and then waited for the rest.
    assert away[0] <= away[1] < _OUTAGE_STEPS
    assert caught == undisturbed


def _last_step(checkpoints: Path) -> int:
    return max(int(path.stem.removeprefix("step-")) for path in checkpoints.glob("step-*.pt"))


def test_a_resumed_run_lists_nothing_again(
    runs: dict[int, list[dict]], pool: Pool, images: str, bucket: str, tmp_path: Path
) -> None:
    shutil.copytree(_fetched(f"{bucket}/runs/workers1", tmp_path / "fetched"), tmp_path / "runs" / "workers1")
    more = scattered_digits(150, held_out=False, seed=9)
    write_shards(more, f"{images}/train/more", rows_per_shard=150, rows_per_group=60)
    try:
        (tmp_path / "runs" / "workers1" / "checkpoints" / f"step-{STEPS:09}.pt").unlink()
        resumed = config_of(command(images, str(tmp_path / "runs"), "workers1", workers=1))
        again = run_training(resumed, launch=pool.launch)
    finally:
        storage.remove(f"{images}/train/more/00000.parquet")
    np.testing.assert_allclose(losses(again), losses(runs[1]), rtol=1e-6)


def _fetched(uri: str, folder: Path) -> Path:
    """A run in object storage as a folder on this machine."""
    for file in storage.listing(uri):
        target = folder / file.path.partition("workers1/")[2]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(storage.read(f"s3://{file.path}") or b"")
    return folder


def test_no_byte_of_an_image_is_stored_a_second_time(
    pool: Pool, bucket: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    contents = [_noise(seed) for seed in range(200)]
    rows = ((content, 0, str(row)) for row, content in enumerate(contents))
    write_shards(rows, f"{bucket}/noise", rows_per_shard=100, rows_per_group=50)
    before = {file.path for file in storage.listing(bucket)}
    started = time.time()
    arguments = small_run(f"{bucket}/noise", str(tmp_path), batch_size=40, epochs=1, workers=2)
    run_training(config_of(arguments), launch=pool.launch)
    assert {file.path for file in storage.listing(bucket)} == before
    # Whatever was written on this machine since: the run, its scratch, what Ray logs and spills.
    written = list(
        _written_since(started, Path(tempfile.gettempdir()), tmp_path_factory.getbasetemp() / "s30")
    )
    assert any(path.suffix == ".pt" for path in written)
    (tmp_path / "control").write_bytes(b"before" + contents[7] + b"after")
    assert _holds_any(tmp_path / "control", contents)
    assert [path for path in written if _holds_any(path, contents)] == []


def _noise(seed: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng([20261124, seed]).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _written_since(moment: float, root: Path, store: Path) -> Iterator[Path]:
    """Files below `root` that were written since `moment`, the object store's own left out."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if Path(folder, name) != store]
        for path in (Path(folder, name) for name in files):
            with suppress(OSError):
                if stat.S_ISREG(path.stat().st_mode) and path.stat().st_mtime >= moment:
                    yield path


def _holds_any(path: Path, contents: list[bytes]) -> bool:
    with suppress(FileNotFoundError):
        written = path.read_bytes()
        return any(content[100:140] in written for content in contents)
    return False


def test_relative_paths_mean_the_folder_of_the_command(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = scattered_digits(16, held_out=False, seed=0)
    write_shards(images, str(tmp_path / "digits"), rows_per_shard=16, rows_per_group=16)
    monkeypatch.chdir(tmp_path)
    arguments = small_run("digits", "runs", batch_size=16, steps=1)
    run_training(config_of(arguments), launch=pool.launch)
    run = tmp_path / "runs" / "run"
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "config.toml", "index", "metrics.jsonl", "report.html", "tensorboard", "views.png",
    ]  # fmt: skip
    assert tomllib.loads((run / "config.toml").read_text())["data"]["train"] == str(tmp_path / "digits")


def _task_that_evaluates_twice() -> Task:
    """A function of a function, which is sent by value: workers cannot import tests."""

    def evaluate_twice(config: TrainConfig, sets: Sets, worker: Worker, progress: Progress) -> None:
        """The second time there are no images in storage any more."""
        encoders = {"knn_top1": raw_pixels(config.data.view.size)}
        first = Evaluator(config, sets, worker).online(encoders, last=False)
        worker.gather.total(torch.zeros(1))  # All have read their share.
        shutil.rmtree(config.data.train, ignore_errors=True)
        shutil.rmtree(config.data.test or "", ignore_errors=True)
        second = Evaluator(config, sets, worker).online(encoders, last=False)
        if worker.gather.rank == 0:
            progress({"first": first, "second": second})

    return evaluate_twice


def _task_that_tells_its_environment() -> Task:
    def tell(config: TrainConfig, sets: Sets, worker: Worker, progress: Progress) -> None:
        progress({name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK")})

    return tell


@pytest.mark.parametrize("workers", [1, 2])
def test_modules_find_their_place_in_the_environment_as_under_torchrun(
    pool: Pool, tmp_path: Path, workers: int
) -> None:
    config, told = config_of(small_run("", str(tmp_path))), list[dict[str, str]]()
    sets = Sets(Index("", "folder", pa.table({})))
    launch = partial(pool.launch, config, sets, told.append, _task_that_tells_its_environment())
    launch(workers=workers, stopping=lambda: False)
    shared = {"WORLD_SIZE": str(workers), "NODE_RANK": "0"}
    assert sorted((place for place in told if "RANK" in place), key=lambda place: place["RANK"]) == [
        shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(workers)
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_evaluations_take_images_from_the_clusters_memory_once_they_were_read(
    pool: Pool, tmp_path: Path, workers: int
) -> None:
    for split, held_out in (("train", False), ("test", True)):
        rows = scattered_digits(120, held_out=held_out, seed=1)
        write_shards(rows, str(tmp_path / split), rows_per_shard=60, rows_per_group=20)
    flags = {"data__test": str(tmp_path / "test"), "evaluation__train_images": 60}
    config = config_of(small_run(str(tmp_path / "train"), str(tmp_path), **flags))
    train, test = (build_index(uri, config.data) for uri in (config.data.train, str(tmp_path / "test")))
    found: dict[str, dict[str, float]] = {}
    launch = partial(
        pool.launch, config, Sets.of(config, train, test), found.update, _task_that_evaluates_twice()
    )
    launch(workers=workers, stopping=lambda: False)
    assert found["second"] == found["first"]
    assert (found["first"]["evaluated_images"], found["first"]["bank_images"]) == (120, 60)
