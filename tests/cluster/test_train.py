"""diptych train, the whole way: S3 to Ray Data to DALI to Ray Train and back to S3."""

import io
import json
import os
import shutil
import stat
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from cluster.cli import main
from cluster.digits import scattered_digits
from cluster.objectstore import S3Server
from pipelines import storage
from pipelines.shards import write_shards

pytestmark = pytest.mark.ray

STEPS = 6
IMAGES = 400


@pytest.fixture(scope="module")
def images(bucket: str) -> str:
    """Digits as Parquet shards in the bucket."""
    for split, count, held_out in (("train", IMAGES, False), ("test", 100, True)):
        rows = scattered_digits(count, held_out=held_out, seed=1)
        write_shards(rows, f"{bucket}/digits/{split}", rows_per_shard=150, rows_per_group=60)
    return f"{bucket}/digits"


def train(
    images: str, output: str, name: str, *flags: str, lanes: int = 4, temperature: float = 1.0
) -> list[dict]:
    """Run the command and read its metrics back from object storage."""
    main(
        ["train", "--data.train", f"{images}/train", "--data.test", f"{images}/test", "--output", output]
        + ["--name", name, "--data.recipe", "simclr-cifar", "--data.window-rows", "32"]
        + ["--encoder.name", "resnet8", "--projector.hidden-dim", "64", "--projector.dim", "32"]
        + [
            "--batch-size",
            "48",
            "--lanes",
            str(lanes),
            "--steps",
            str(STEPS),
            "--seed",
            "3",
            "--temperature",
            str(temperature),
        ]
        + ["--optimizer.name", "sgd", "--optimizer.learning-rate", "0.02", *flags]
    )
    content = storage.read(f"{output}/{name}/metrics.jsonl")
    assert content is not None
    return [json.loads(line) for line in content.decode().splitlines()]


@pytest.fixture(scope="module")
def runs(ray_cluster: None, images: str, bucket: str) -> dict[int, list[dict]]:
    """The same config on one and two workers, read from and written to S3."""
    return {
        workers: train(images, f"{bucket}/runs", f"workers{workers}", "--workers", str(workers))
        for workers in (1, 2)
    }


def test_loss_is_the_same_on_one_worker_and_on_two(runs: dict[int, list[dict]]) -> None:
    alone, together = ([line["loss"] for line in runs[count] if "loss" in line] for count in (1, 2))
    assert len(alone) == STEPS
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_untrained_accuracy_is_the_same_on_one_worker_and_on_two(runs: dict[int, list[dict]]) -> None:
    alone, together = (next(line for line in runs[count] if "knn_top1" in line) for count in (1, 2))
    assert together == pytest.approx(alone, rel=1e-5)


def test_metrics_have_each_step_once_and_an_evaluation_at_either_end(runs: dict[int, list[dict]]) -> None:
    lines = runs[2]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    stages = {f"{stage}_seconds" for stage in ("data_wait", "forward", "gather", "backward", "optimizer")}
    assert all(
        set(line) == {"step", "epoch", "loss", "learning_rate", "images_per_second"} | stages
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
    runs: dict[int, list[dict]], bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"{bucket}/runs/workers2"
    main(["eval", run, "--protocol", "linear", "--labels", "0.5", "--probe.epochs", "5", "--workers", "2"])
    (line,) = (storage.read(f"{run}/evaluations.jsonl") or b"").decode().splitlines()
    found = json.loads(line)
    assert (found["protocol"], found["step"], found["labels"]) == ("linear", STEPS, 0.5)
    assert f"with 50% of the labels: {found['top1']:.2%}" in capsys.readouterr().out


def test_a_run_is_fine_tuned_in_a_run_of_its_own_and_the_result_kept(
    runs: dict[int, list[dict]], bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"{bucket}/runs/workers1"
    arguments = ["eval", run, "--protocol", "finetune", "--labels", "0.5", "--finetune.epochs", "2"]
    main(arguments)
    lines = [json.loads(line) for line in (storage.read(f"{run}/evaluations.jsonl") or b"").splitlines()]
    assert f"with 50% of the labels: {lines[-1]['top1']:.2%}" in capsys.readouterr().out
    found = lines[-1]
    assert (found["protocol"], found["step"], found["labels"]) == ("finetune", STEPS, 0.5)
    assert found["run"].startswith(f"{run}/finetune/labels-0.5-")
    tuned = tomllib.loads((storage.read(f"{found['run']}/config.toml") or b"").decode())
    assert tuned["init"] == f"{run}/checkpoints/step-{STEPS:09}.pt"
    assert (tuned["objective"], tuned["data"]["recipe"]) == ("supervised", "supervised")
    metrics = [
        json.loads(line) for line in (storage.read(f"{found['run']}/metrics.jsonl") or b"").splitlines()
    ]
    first = next(line for line in metrics if "knn_top1" in line)
    assert first["step"] == 0
    assert first["knn_top1"] > 0
    assert found["top1"] == [line["top1"] for line in metrics if "top1" in line][-1]
    main(arguments)  # A second time there is nothing to train.
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["workers1", "--protocol", "finetune", "--features", "projector"], "has no effect with protocol"),
        (["nowhere"], "nowhere is no run: there is no config.toml"),
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
    assert train(images, f"{bucket}/runs", "workers2", "--workers", "2") == runs[2]
    assert "is finished: 6 steps" in capsys.readouterr().out


def test_another_config_is_refused_by_its_fields(
    runs: dict[int, list[dict]], images: str, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train(images, f"{bucket}/runs", "workers2", "--optimizer.momentum", "0.8", temperature=0.7)
    assert stopped.value.code == 2
    assert "other values of optimizer.momentum, temperature" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "8"], "workers=8 need 16 CPUs of the cluster, which has 9; try --workers 4"),
        (["--workers", "2", "--cpus-per-worker", "5"], "workers=2 need 10 CPUs of the cluster, which has 9"),
        (
            ["--gpus-per-worker", "0.5"],
            "need 0.5 GPUs of the cluster, which has 0; leave out gpus_per_worker",
        ),
    ],
)
def test_more_than_the_cluster_holds_is_refused(
    flags: list[str],
    message: str,
    ray_cluster: None,
    images: str,
    bucket: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train(images, f"{bucket}/runs", "many", *flags, lanes=8)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_data_without_a_good_image_ends_in_one_line_that_names_the_file(
    ray_cluster: None, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards([(b"no image", 0, "a")] * 100, f"{bucket}/broken", rows_per_shard=100, rows_per_group=100)
    with pytest.raises(SystemExit) as stopped:
        main(
            ["train", "--data.train", f"{bucket}/broken", "--output", f"{bucket}/runs", "--name", "broken"]
            + ["--encoder.name", "resnet8", "--batch-size", "8", "--steps", "1"]
        )
    message = str(stopped.value.code)
    assert "a of diptych-tests/broken/00000.parquet: no image in a known format" in message
    assert b"Traceback" in (storage.read(f"{bucket}/runs/broken/error.log") or b"")


# Windows of one step, so that Ray Data starts on a new part of the stream, and reads again, in mid-run.
_OUTAGE_STEPS, _OUTAGE_SECONDS = 90, 20


def _long(images: str, output: Path, name: str) -> list[float]:
    """Losses of a run that is long enough to be caught in the middle."""
    main(
        ["train", "--data.train", f"{images}/train", "--output", str(output), "--name", name]
        + ["--data.recipe", "simclr-cifar", "--data.window-rows", "12", "--encoder.name", "resnet8"]
        + ["--projector.hidden-dim", "64", "--projector.dim", "32", "--temperature", "1.0", "--workers", "1"]
        + [
            "--batch-size",
            "48",
            "--lanes",
            "4",
            "--steps",
            str(_OUTAGE_STEPS),
            "--checkpoint.every-steps",
            "10",
        ]
        + ["--optimizer.name", "sgd", "--optimizer.learning-rate", "0.02"]
    )
    lines = (output / name / "metrics.jsonl").read_text().splitlines()
    return [values["loss"] for values in map(json.loads, lines) if "loss" in values]


@pytest.mark.slow
def test_a_run_outlives_a_storage_that_is_away_for_a_while(
    ray_cluster: None, s3: S3Server, images: str, tmp_path: Path
) -> None:
    undisturbed = _long(images, tmp_path, "undisturbed")
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
        losses = _long(images, tmp_path, "caught")
    finally:
        thread.join()
    # While the storage was away the run used up what was read ahead, and then waited for the rest.
    assert away[0] <= away[1] < _OUTAGE_STEPS
    assert losses == undisturbed


def _last_step(checkpoints: Path) -> int:
    return max(int(path.stem.removeprefix("step-")) for path in checkpoints.glob("step-*.pt"))


def test_a_resumed_run_lists_nothing_again(
    runs: dict[int, list[dict]], images: str, bucket: str, tmp_path: Path
) -> None:
    shutil.copytree(_fetched(f"{bucket}/runs/workers1", tmp_path / "fetched"), tmp_path / "runs" / "workers1")
    more = scattered_digits(150, held_out=False, seed=9)
    write_shards(more, f"{images}/train/more", rows_per_shard=150, rows_per_group=60)
    try:
        (tmp_path / "runs" / "workers1" / "checkpoints" / f"step-{STEPS:09}.pt").unlink()
        again = train(images, str(tmp_path / "runs"), "workers1", "--workers", "1")
    finally:
        storage.remove(f"{images}/train/more/00000.parquet")
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (again, runs[1])]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def _fetched(uri: str, folder: Path) -> Path:
    """A run in object storage as a folder on this machine."""
    for file in storage.listing(uri):
        target = folder / file.path.partition("workers1/")[2]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(storage.read(f"s3://{file.path}") or b"")
    return folder


def test_no_byte_of_an_image_is_stored_a_second_time(
    ray_cluster: None, bucket: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    contents = [_noise(seed) for seed in range(200)]
    rows = ((content, 0, str(row)) for row, content in enumerate(contents))
    write_shards(rows, f"{bucket}/noise", rows_per_shard=100, rows_per_group=50)
    before = {file.path for file in storage.listing(bucket)}
    started = time.time()
    main(
        ["train", "--data.train", f"{bucket}/noise", "--output", str(tmp_path), "--encoder.name", "resnet8"]
        + ["--data.recipe", "simclr-cifar", "--batch-size", "40", "--epochs", "1", "--workers", "2"]
    )
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
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = scattered_digits(16, held_out=False, seed=0)
    write_shards(images, str(tmp_path / "digits"), rows_per_shard=16, rows_per_group=16)
    monkeypatch.chdir(tmp_path)
    main(
        ["train", "--data.train", "digits", "--encoder.name", "resnet8", "--batch-size", "16", "--steps", "1"]
    )
    run = tmp_path / "runs" / "run"
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "config.toml", "index", "metrics.jsonl", "report.html", "tensorboard", "views.png",
    ]  # fmt: skip
    assert tomllib.loads((run / "config.toml").read_text())["data"]["train"] == str(tmp_path / "digits")
