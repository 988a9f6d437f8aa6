"""Disks that are full under whole commands: the run's, the one of its error.log, and Ray's own."""

import subprocess
from pathlib import Path

import pytest
import torch
from commands import diptych
from pool import Pool
from small_disks import Full, small_disk

from cluster.cli.main import app
from cluster.digits import scattered_digits
from cluster.train import run_training
from pipelines.shards import write_shards
from training.errors import RunError
from training.metrics import read_metrics

pytestmark = pytest.mark.ray

_STEPS = 12


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_shards(
        scattered_digits(100, held_out=False, seed=4), str(folder), rows_per_shard=50, rows_per_group=25
    )
    return folder


def _training(images: Path, output: Path) -> list[str]:
    return (
        ["train", "--data.train", str(images), "--output", str(output), "--workers", "1", "--lanes", "2"]
        + ["--data.recipe", "simclr-cifar", "--encoder.name", "resnet8", "--batch-size", "32"]
        + ["--projector.hidden-dim", "64", "--projector.dim", "32", "--steps", str(_STEPS)]
        + ["--checkpoint.every-steps", "2", "--evaluation.diagnostic-images", "0"]
        + ["--optimizer.name", "sgd", "--optimizer.learning-rate", "0.02"]
    )


def _checkpoints(output: Path) -> dict[int, Path]:
    return {int(path.stem[5:]): path for path in (output / "run" / "checkpoints").glob("*.pt")}


@pytest.mark.slow
def test_a_run_whose_disk_has_no_room_for_one_more_ends_in_one_line_and_resumes_to_the_same_weights(
    images: Path, tmp_path: Path
) -> None:
    done = diptych(*_training(images, tmp_path))
    assert done.returncode == 0, done.stderr
    whole = _checkpoints(tmp_path)[_STEPS]
    with small_disk(tmp_path / "disk", f"size={int(2.7 * whole.stat().st_size)}") as disk:
        ended = diptych(*_training(images, disk), DIPTYCH_STORAGE_TIMEOUT="2")
        assert ended.returncode == 1
        *_, said = ended.stderr.splitlines()
        assert said.startswith(
            "diptych: no checkpoint could be written for 2 s: [Errno 28] No space left on "
        )
        way_out = f"free space there, then: diptych train --resume {disk}/run"
        assert said.endswith(f"; that of step 4 is complete; {way_out}")
        assert "resuming from this step" not in ended.stderr  # That is another attempt to train.
        assert sorted(_checkpoints(disk)) == [2, 4]
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        again = diptych("train", "--resume", f"{disk}/run")
        assert again.returncode == 0, again.stderr
        assert (disk / "run" / "report.html").is_file()
        ours, theirs = (
            torch.load(path, weights_only=True)["model"] for path in (_checkpoints(disk)[_STEPS], whole)
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        steps = [line["step"] for line in read_metrics(f"{disk}/run") if "loss" in line]
        assert steps == list(range(1, _STEPS + 1))


def test_a_failure_whose_traceback_cannot_be_written_is_told_all_the_same(
    images: Path, pool: Pool, tmp_path: Path
) -> None:
    rows = [
        (content[:-30], label, key) for content, label, key in scattered_digits(50, held_out=False, seed=4)
    ]
    write_shards(iter(rows), str(tmp_path / "images"), rows_per_shard=50, rows_per_group=25)
    config = app.parse_args(_training(tmp_path / "images", tmp_path))[1].arguments["run"]
    (tmp_path / "run" / "error.log" / "inside").mkdir(parents=True)
    with pytest.raises(
        RunError, match=r"^worker 0 failed: ValueError: .*images.* \(no traceback: \[Errno 21\] "
    ):
        run_training(config, launch=pool.launch)


def test_a_full_folder_of_rays_is_one_line_before_anything_starts(
    images: Path, short: Path, tmp_path: Path
) -> None:
    with small_disk(short / "s") as disk:
        Full(disk).begin()
        done = diptych(*_training(images, tmp_path), RAY_TMPDIR=str(disk), RAY_ADDRESS="local")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        f"diptych: Ray's temporary folder in {disk} has 0 MiB free"
    )
