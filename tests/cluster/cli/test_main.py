"""The command line: bad input ends in one clear line and exit code 2, and nothing is written."""

import io
import socket
from pathlib import Path

import pytest
from commands import diptych
from ray._private.utils import check_version_info
from rich.console import Console

from cluster.cli.main import app, main
from cluster.digits import scattered_digits
from cluster.ray_cluster import _other_versions
from pipelines.config import DataConfig
from pipelines.shards import write_shards
from training.config import TrainConfig
from training.run_folder import encode_toml, to_values


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("digits"))
    write_shards(scattered_digits(64, held_out=False, seed=0), folder, rows_per_shard=64, rows_per_group=32)
    return folder


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "mine.toml"
    path.write_text('batchsize = 32\n[data]\ntrain = "/nowhere"\n')
    return str(path)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command leaves on standard error."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-siz", "3"], "Unknown option: --batch-siz. Did you mean --batch-size?"),
        (["--optimizer.learningrate", "3"], "Did you mean --optimizer.learning-rate?"),
        (["--batch-size", "30"], "batch_size=30 must be a multiple of lanes=8; try --batch-size 24"),
        (["--workers", "3"], "lanes=8 must be a multiple of workers=3; try --workers out of 1, 2, 4, 8"),
        (["--batch-size", "-8"], "batch_size=-8: Input should be greater than or equal to 1"),
        (["--epochs", "many"], "epochs=many: Input should be a valid integer"),
        (["--batch-size", "128"], "the data set has 64 images, less than one batch of batch_size=128"),
        (["--encoder.name", "resnet99"], "encoder.name=resnet99: no such encoder; there are resnet"),
        (["--encoder.name", "resnet20", "--encoder.stem", "cifar"], "encoder.stem has no effect on resnet20"),
        (["--data.recipe", "simcrl"], "no recipe 'simcrl'; there are simclr, simclr-cifar"),
        (["--data.image-column", "picture"], "no column 'picture' among image, label, key"),
        (["--data.test", "/nowhere"], "/nowhere does not exist"),
        (["--name", "a/b"], "name=a/b is not a valid name; use lowercase letters, digits and hyphens"),
        (["--data.view.crop-scale", "1", "0.5"], "needs two numbers with 0 < low <= high"),
    ],
)
def test_wrong_flag_is_named_with_the_way_out(
    images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    output = tmp_path / "runs"
    assert message in refused(["train", "--data.train", images, "--output", str(output), *flags], capsys)
    assert not output.exists()


def test_output_that_cannot_be_written_is_named(
    images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    flags = ["--output", str(tmp_path / "file"), "--batch-size", "8"]
    assert "/file/run: [Errno 20]" in refused(["train", "--data.train", images, *flags], capsys)


def test_data_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "/no/such/folder does not exist" in refused(["train", "--data.train", "/no/such/folder"], capsys)


def test_folder_without_images_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{tmp_path} holds no image" in refused(["train", "--data.train", str(tmp_path)], capsys)


def test_bucket_that_does_not_exist_is_named(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "s3://no-such-bucket/a does not exist" in refused(
        ["train", "--data.train", "s3://no-such-bucket/a"], capsys
    )


def test_credentials_in_a_uri_are_refused_and_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["train", "--data.train", "s3://key:hunter2@bucket/a"], capsys)
    assert "AWS_ACCESS_KEY_ID" in line
    assert "hunter2" not in line


def test_unknown_key_in_a_config_file_is_named_with_the_nearest(
    config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["train", config_file], capsys)
    assert "batchsize" in line
    assert "--batch-size" in line


def test_config_that_is_not_toml_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text("batch_size: 3")
    assert "mine.toml is not TOML" in refused(["train", str(tmp_path / "mine.toml")], capsys)


def test_unknown_config_lists_the_shipped_ones(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["train", "cifar"], capsys)
    assert "neither a TOML file nor one of byol-imagenet-resnet50, demo, simclr-cifar10-resnet18" in line


@pytest.mark.parametrize("config", [[], ["simclr-cifar10-resnet20"]])
def test_missing_data_names_the_flag(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = "diptych: data.train is missing; give it in the config or as --data.train"
    assert refused(["train", *config], capsys) == line


def test_missing_word_of_a_command_leads_to_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(["data", "pack", "x"], capsys) == "diptych: DEST is missing; see diptych data pack --help"


def test_images_in_the_place_of_the_config_are_told(images: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"give images as --data.train {images}" in refused(["train", images], capsys)
    assert "give images as --data.train s3://b/x" in refused(["train", "s3://b/x"], capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "mine.toml is not TOML: 'utf-8' codec"),
        (b"data = 3", "data=3 must be a table: write [data], and its keys below"),
        (b'encoder = "resnet18"\n[data]\ntrain = "x"', "encoder=resnet18 must be a table: write [encoder]"),
    ],
)
def test_config_of_another_kind_is_told(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.toml").write_bytes(content)
    assert message in refused(["train", str(tmp_path / "mine.toml")], capsys)


def test_search_without_a_training_config_is_told(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "mine.toml is not a search: it has no table [train]" in refused(["tune", config_file], capsys)
    (tmp_path / "mine.toml").write_text('nonsense = 3\n[train.data]\ntrain = "x"\n[space]\n')
    assert "there is no key nonsense; check the spelling" in refused(["tune", config_file], capsys)
    assert "give it in the config or as --data" in refused(["tune", "simclr"], capsys)


def test_what_the_storage_refuses_is_one_line(
    bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    said = refused(["tune", "status", f"{bucket}/search"], capsys)
    assert "search.toml" in said
    assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in said


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:port"])
def test_addresses_that_are_none_are_refused(address: str) -> None:
    done = diptych("cluster", "status", RAY_ADDRESS=address)
    assert done.returncode == 2
    assert f"RAY_ADDRESS={address} is not the address" in done.stderr


def test_port_where_something_else_listens_is_no_cluster() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        done = diptych("cluster", "status", RAY_ADDRESS=address)
    assert done.returncode == 2
    assert f"no Ray cluster answers at {address}" in done.stderr


def test_versions_that_differ_are_one_line() -> None:
    # A cluster of another Ray would be another installation; the error is that of Ray's own check.
    with pytest.raises(RuntimeError) as raised:
        check_version_info({"ray_version": "2.9.1", "python_version": "3.9.2"}, "this process")
    said = _other_versions("10.0.0.1:6379", raised.value)
    assert "at 10.0.0.1:6379 has Ray 2.9.1 and Python 3.9.2, this process Ray" in said
    assert "\n" not in said


def test_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert 'Did you mean "train"?' in refused(["trian"], capsys)


def test_help_explains_every_field() -> None:
    out = io.StringIO()
    app.help_print(
        ["train"], console=Console(file=out, width=250)
    )  # So wide that no flag needs a second line.
    text = out.getvalue()
    for flag in ("--batch-size", "--lanes", "--seed", "--data.view.crop-scale", "--optimizer.learning-rate"):
        assert flag in text
    undocumented = [line for line in text.splitlines() if line.rstrip(" │").endswith(("INT", "FLOAT", "STR"))]
    assert undocumented == []


def test_every_table_of_a_file_counts_also_those_named_like_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'epochs = 1\n[data]\ntrain = "/nowhere"\n[data.view]\nsize = 64\n[encoder]\nname = "resnet18"\n'
    )
    assert (
        refused(["train", str(path)], capsys)
        == "diptych: /nowhere does not exist; give a file or a folder that does"
    )
    assert "data.view.size=7" in refused(["train", str(path), "--data.view.size", "7"], capsys)


def test_a_run_to_resume_must_be_one_and_has_its_own_config(
    tmp_path: Path, images: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is not a run: it has no config.toml" in refused(["train", "--resume", str(tmp_path)], capsys)
    assert "not both" in refused(["train", "demo", "--resume", str(tmp_path)], capsys)
    config = TrainConfig(data=DataConfig(train=images), name="elsewhere", output="/not/here", steps=2)
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "config.toml").write_bytes(encode_toml(to_values(config)))
    message = refused(["train", "--resume", str(tmp_path / "moved"), "--steps", "3"], capsys)
    assert message == f"diptych: {tmp_path}/moved is a run with other values of steps; try another --name"


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ("x", "workers=x: needs a number from 1 or FEWEST:MOST, as 1:4, got x"),
        ("4:1", "needs FEWEST:MOST"),
        ("0", "needs a number from 1"),
        ("3:3", "lanes=8 is a multiple of no number in workers=3:3; include one of 1, 2, 4, 8"),
        ("3", "lanes=8 must be a multiple of workers=3; try --workers out of 1, 2, 4, 8"),
    ],
)
def test_numbers_of_workers_that_cannot_be_are_refused(
    workers: str, message: str, images: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(["train", "--data.train", images, "--workers", workers], capsys)
