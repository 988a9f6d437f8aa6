"""diptych data: pack, inspect, preview and embed, from the disk into S3, killed and taken up again."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

from cluster.cli.main import app, main
from cluster.digits import scattered_digits
from pipelines import storage
from pipelines.config import DataConfig
from pipelines.index import build_index
from pipelines.philox import derive_key, permutation
from training.checkpoint import Checkpoints
from training.config import EncoderConfig, TrainConfig
from training.gather import LocalGather
from training.objective_builder import build_objective
from training.run_folder import claim_run
from training.trainer import run_uri

NAMES = ("apple", "pear", "plum")
IMAGES = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three classes, and a file in it that is no image."""
    folder = tmp_path_factory.mktemp("fruit")
    for name in NAMES:
        (folder / name).mkdir()
    for number, (content, _, _) in enumerate(scattered_digits(IMAGES, held_out=False, seed=4)):
        (folder / NAMES[number % 3] / f"{number:03}.png").write_bytes(content)
    (folder / "pear" / "broken.png").write_bytes(b"no image")
    return folder


def content_of(folder: Path) -> list[tuple[bytes, int, str]]:
    """Every good image of the folder in the order of its path: bytes, label and key."""
    paths = sorted(path for path in folder.rglob("*.png") if path.name != "broken.png")
    return [
        (path.read_bytes(), NAMES.index(path.parent.name), str(path.relative_to(folder))) for path in paths
    ]


def packed(dest: str) -> list[tuple[bytes, int, str]]:
    """What the shards at `dest` hold, in the order of their names."""
    names = [name for name in storage.names(dest) if name.endswith(".parquet")]
    tables = [pq.read_table(io.BytesIO(storage.read(f"{dest}/{name}") or b"")) for name in names]
    return [(row["image"], row["label"], row["key"]) for table in tables for row in table.to_pylist()]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command leaves on standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["data", *arguments])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def make_run(images: Path, output: Path) -> None:
    """OUTPUT/run: a config and a checkpoint of step 1, as training leaves them."""
    data = DataConfig(train=str(images), recipe="simclr-cifar")
    config = TrainConfig(data=data, output=str(output), encoder=EncoderConfig(name="resnet8"))
    torch.manual_seed(0)
    objective = build_objective(config, build_index(str(images), data), LocalGather())
    optimizer = torch.optim.SGD(objective.parameters(), 0.1)
    claim_run(run_uri(config), config)
    Checkpoints(run_uri(config), keep=1).save(1, objective, optimizer, config)


def kill_once(arguments: list[str], reached: Callable[[], bool]) -> None:
    """Run the command on the session's cluster, and kill its driver once `reached()`."""
    import ray

    process = subprocess.Popen(
        [sys.executable, "-c", f"from cluster.cli.main import main; main({arguments!r})"],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stderr=subprocess.DEVNULL,
    )
    while not reached():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.ray
def test_packing_that_was_killed_goes_on_and_keeps_every_byte(
    ray_cluster: None, folder: Path, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dest = f"{bucket}/fruit"
    arguments = ["data", "pack", str(folder), dest, "--rows-per-shard", "2", "--shuffle", "none"]
    kill_once(arguments, lambda: len(storage.names(dest)) >= 5)
    finished = {file.path: file.mtime for file in storage.listing(dest)}
    assert 4 <= len(finished) < IMAGES // 2

    assert "rows_per_shard (2 there, 3 here)" in refused(
        ["pack", str(folder), dest, "--rows-per-shard", "3", "--shuffle", "none"], capsys
    )
    assert "shuffle (no there, of all images, seed 0 here)" in refused(["pack", str(folder), dest], capsys)
    main(arguments)
    assert packed(dest) == content_of(folder)
    after = {file.path: file.mtime for file in storage.listing(dest)}
    assert {path: after[path] for path in finished} == finished
    assert "300 images in 151 shards" in capsys.readouterr().out
    filesystem, path = storage.resolve(dest)
    assert pq.read_table(path, filesystem=filesystem)["image"].to_pylist() == [
        row[0] for row in content_of(folder)
    ]
    (bad,) = (storage.read(f"{dest}/_quarantine.jsonl") or b"").splitlines()
    assert json.loads(bad) == {
        "path": str(folder / "pear" / "broken.png"),
        "key": "pear/broken.png",
        "reason": "no image in a known format, or truncated",
        "sample": 200,
        "crc32": bad[-10:-2].decode(),
    }


def shuffled_content(folder: Path, seed: int) -> list[tuple[bytes, int, str]]:
    """Every good image of the folder, as a full shuffle of all its files by `seed` has them."""
    content = {key: (image, label, key) for image, label, key in content_of(folder)}
    keys = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    order = permutation(derive_key(seed, 5), len(keys))
    return [content[keys[row]] for row in order if keys[row] in content]


@pytest.mark.ray
def test_a_shuffle_killed_in_either_pass_goes_on_to_one_permutation_of_all(
    ray_cluster: None, folder: Path, bucket: str, tmp_path: Path
) -> None:
    source, dest = str(tmp_path / "sorted"), f"{bucket}/shuffled-fruit"
    main(["data", "pack", str(folder), source, "--rows-per-group", "4", "--shuffle", "none"])
    assert packed(source) == content_of(folder)
    arguments = ["data", "pack", source, dest, "--rows-per-shard", "4", "--rows-per-part", "8"]
    arguments += ["--shuffle", "6"]

    def names(prefix: str) -> list[str]:
        return [name for name in storage.names(dest) if name.startswith(prefix)]

    kill_once(arguments, lambda: len(names("_part-")) >= 3)
    assert not names("0")
    parts = {file.path: file.mtime for file in storage.listing(dest)}
    kill_once(arguments, lambda: len(names("0")) >= 3)
    assert len(names("_part-")) == 38
    before = {file.path: file.mtime for file in storage.listing(dest)}
    assert parts.items() <= before.items()
    main(arguments)
    assert storage.names(dest) == [*(f"{n:05}.parquet" for n in range(75)), "_source.json"]
    after = {file.path: file.mtime for file in storage.listing(dest)}
    assert {path: mtime for path, mtime in before.items() if path in after}.items() <= after.items()
    rows, content = packed(dest), content_of(folder)
    assert rows == [content[row] for row in permutation(derive_key(6, 5), IMAGES)]


@pytest.mark.ray
def test_a_folder_is_packed_in_a_random_order_unless_told_otherwise(
    ray_cluster: None, folder: Path, tmp_path: Path
) -> None:
    main(["data", "pack", str(folder), str(tmp_path / "packed")])
    assert packed(str(tmp_path / "packed")) == shuffled_content(folder, 0)


@pytest.mark.ray
def test_an_inspection_says_how_well_batches_would_be_mixed(
    ray_cluster: None, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, options in (("sorted", ["--shuffle", "none"]), ("packed", [])):
        main(["data", "pack", str(folder), str(tmp_path / name), "--rows-per-group", "4", *options])
        capsys.readouterr()
        main(["data", "inspect", str(tmp_path / name), "--json"])
        mixing = json.loads(capsys.readouterr().out)["mixing"]
        assert mixing["shuffled_same_class"] == pytest.approx(99 / 299)
        # 256 of 300 images are nearly all: the pairs of so large a batch are those of a full shuffle.
        assert mixing["same_class"] == pytest.approx(1 / 3, abs=0.02)
        main(["data", "inspect", str(tmp_path / name)])
        assert "full shuffle" in capsys.readouterr().out


@pytest.mark.ray
def test_a_key_is_data_and_no_path(ray_cluster: None, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "images.tar", "w") as tar:
        tar.add(folder / "apple" / "000.png", "../../x.png")
        tar.add(folder / "pear" / "broken.png", "../../y.png")
    make_run(folder, tmp_path)
    before = set(tmp_path.rglob("*"))
    dest = tmp_path / "deep" / "out"
    main(["data", "pack", str(tmp_path / "in"), str(dest)])
    main(["data", "embed", str(tmp_path / "run"), str(tmp_path / "in"), str(tmp_path / "deep" / "features")])
    names = ["00000.parquet", "_quarantine.jsonl", "_source.json"]
    below = [place / name for place in (dest, tmp_path / "deep" / "features") for name in ("", *names)]
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "deep", *below}
    for place in (dest, tmp_path / "deep" / "features"):
        assert pq.read_table(place / "00000.parquet")["key"].to_pylist() == ["../../x"]


@pytest.mark.ray
def test_an_inspection_counts_what_is_there(
    ray_cluster: None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    main(["data", "inspect", str(folder), "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["classes"] == dict.fromkeys(NAMES, IMAGES // 3)
    assert (values["images"], values["bad_images"], values["files"]) == (IMAGES, 1, IMAGES + 1)
    assert values["height"] == {"min": 32, "median": 32, "max": 32}
    assert values["bytes"] == sum(len(content) for content, _, _ in content_of(folder))
    assert values["bad"][0]["examples"] == [f"pear/broken.png of {folder}/pear/broken.png"]
    assert "epoch" not in values
    main(["data", "inspect", str(folder), "--json", "--cost", "0.4"])
    epoch = json.loads(capsys.readouterr().out)["epoch"]
    # A batch of 256 images in 8 lanes, and two requests for each.
    assert (epoch["images"], epoch["requests"], epoch["price"]) == (256, 512, pytest.approx(0.2048))
    main(["data", "inspect", str(folder), "--cost", "0.4"])
    shown = capsys.readouterr().out
    assert "512 requests for 0.20, and" in shown
    assert "plum" in shown
    assert "100" in shown


@pytest.mark.ray
def test_features_of_a_run_are_written_and_finished_shards_are_left(
    ray_cluster: None, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(folder, tmp_path)
    arguments = [str(tmp_path / "run"), str(folder), str(tmp_path / "features"), "--rows-per-shard", "200"]
    main(["data", "embed", *arguments])
    first, second = (tmp_path / "features" / f"0000{n}.parquet" for n in range(2))
    rows = pq.read_table(tmp_path / "features").to_pylist()
    assert [(row["label"], row["key"]) for row in rows] == [row[1:] for row in content_of(folder)]
    assert [row["class"] for row in rows] == [NAMES[label] for _, label, _ in content_of(folder)]
    assert {len(row["feature"]) for row in rows} == {64}
    assert np.std([row["feature"] for row in rows], axis=0).max() > 0

    before, kept = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()
    main(["data", "embed", *arguments])
    assert first.stat().st_mtime_ns == kept
    again = pq.read_table(second)
    np.testing.assert_allclose(
        again["feature"].to_pylist(), pq.read_table(io.BytesIO(before))["feature"].to_pylist(), rtol=1e-5
    )
    assert "300 images in 2 shards" in capsys.readouterr().out
    assert "has no checkpoint of step 9; it has 1" in refused(
        ["embed", *arguments[:2], str(tmp_path / "other"), "--checkpoint", "9"], capsys
    )
    assert not (tmp_path / "other").exists()


def test_a_preview_shows_images_with_their_views(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "sheet.png"
    main(
        [
            "data",
            "preview",
            str(folder),
            "-o",
            str(output),
            "--recipe",
            "byol",
            "--size",
            "96",
            "--images",
            "5",
        ]
    )
    with Image.open(output) as sheet:
        assert sheet.size == (5 * 100 - 4, 3 * 100 - 4)
    assert "5 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "/no/such/folder", "{tmp}/out"], "/no/such/folder does not exist"),
        (["pack", "torchvision:CIFAR1?root=x", "{tmp}/out"], "did you mean CIFAR10?"),
        (["pack", "{folder}", "{folder}/out"], "lies within"),
        (["pack", "{folder}", "{folder}/pear"], "lies within"),
        (["pack", "{folder}", "{tmp}"], "is not empty: "),
        (["pack", "{folder}", "{tmp}/file/out"], "cannot write {tmp}/file/out"),
        (["pack", "{folder}", "{tmp}/out", "--rows-per-shard", "0"], "rows-per-shard"),
        (["pack", "{folder}", "{tmp}/out", "--shuffle", "yes"], "--shuffle"),
        (["pack", "{folder}", "{tmp}/out", "--rows-per-shad", "9"], "Did you mean --rows-per-shard?"),
        (["inspect", "{tmp}/none"], "{tmp}/none does not exist"),
        (["inspect", "{folder}", "--cost", "-1"], "--cost"),
        (["inspect", "{folder}/pear", "--cost", "0.4"], "has fewer images than a batch of 256; leave out"),
        (["preview", "{folder}", "-o", "{tmp}/p.png", "--recipe", "simcrl"], "no recipe 'simcrl'; there are"),
        (["preview", "{folder}", "-o", "{tmp}/file/p.png"], "cannot write {tmp}/file/p.png"),
        (["embed", "{tmp}/none", "{folder}", "{tmp}/out"], "{tmp}/none is not a run"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    places = {"tmp": tmp_path, "folder": folder}
    line = refused([argument.format(**places) for argument in arguments], capsys)
    assert message.format(**places) in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("command", ["pack", "inspect", "preview", "embed"])
def test_help_explains_every_flag(command: str) -> None:
    out = io.StringIO()
    app.help_print(["data", command], console=Console(file=out, width=250))
    text = out.getvalue()
    assert "--max-pixels" in text
    undocumented = [line for line in text.splitlines() if line.rstrip(" │").endswith(("INT", "FLOAT", "STR"))]
    assert undocumented == []
