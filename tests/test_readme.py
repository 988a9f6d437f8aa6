"""README.md: its commands are ones that the command line takes, its files exist; the slow tests run them all.

In the page's order, in a home such as it supposes, only shortened; on the tests' cluster, so that not each
starts one, but for those from the page's own `up` to `down`.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from commands import diptych
from cyclopts import CycloptsError
from folders import digit_folders
from pyarrow.fs import S3FileSystem

from cluster.cli.main import app
from cluster.objectstore import S3Server
from pipelines.config import DataConfig
from training.config import TrainConfig
from training.run_folder import claim_run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

# What makes a command quick: smaller numbers for flags that it has, and flags that are added.
SHORTER = {"--epochs": "1", "--batch-size": "32", "--data.view.size": "32"}
ADDED = {
    "eval": ["--probe.epochs", "3"],
    "data digits": ["--count", "512"],
    "train demo": ["--steps", "8"],
    "benchmarks/promise.py": ["--steps", "10", "--workers", "1"],
    "tune simclr": ["--trials", "2", "--max-minutes", "3"],
}


def lines(language: str = "") -> list[str]:
    """The commands of the page's blocks in that language, each on one line."""
    joined = [block.replace("\\\n", " ") for found, block in BLOCKS if found == language]
    return [
        line
        for block in joined
        for line in block.splitlines()
        if line.startswith(("diptych ", "python ", "make "))
    ]


def shortened(line: str) -> list[str]:
    """The words of the command after `diptych`, made quick."""
    words = shlex.split(line, comments=True)[1:]
    for before, word in enumerate(words[1:]):
        words[before + 1] = SHORTER.get(words[before], word)
    for beginning, flags in ADDED.items():
        if " ".join(words).startswith(beginning):
            words += flags
    return words


def toml_files() -> dict[str, str]:
    """The page's TOML files, by the names that their first lines give."""
    named = ((re.match(r"# ([\w.]+\.toml)", block), block) for found, block in BLOCKS if found == "toml")
    return {name[1]: block for name, block in named if name}


def check(words: list[str]) -> None:
    """Raise CycloptsError unless `diptych` takes the words."""
    app.parse_args(words, print_error=False, exit_on_error=False)
    if "--" in words:  # A job's own command.
        check(words[words.index("--") + 1 :])


def test_the_command_line_takes_every_command_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in toml_files().items():
        (tmp_path / name).write_text(content)
    # What the page's commands themselves write.
    (tmp_path / "best.toml").write_text(toml_files()["my.toml"])
    claim_run("runs/first", TrainConfig(data=DataConfig(train="photos")))
    commands = [line for line in lines() if line.startswith("diptych ") and "--resume" not in line]
    assert len(commands) > 15
    for line in commands:
        check(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize(
    "line",
    ["train my.toml --bach-size 3", "submit -- train my.toml --nodes 3", "data pak photos s3://b/c", "eval"],
)
def test_a_command_that_it_does_not_take_would_be_found(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.toml").write_text(toml_files()["my.toml"])
    with pytest.raises(CycloptsError):
        check(line.split())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, s3: S3Server, ray_cluster: None) -> Iterator[Path]:
    """A folder with the page's photos and TOML files; its bucket is on the tests' S3 server."""
    folder = tmp_path_factory.mktemp("home")
    digit_folders(folder / "photos", 320)
    digit_folders(folder / "more-photos", 40, held_out=True)
    for name, content in toml_files().items():
        small = content.replace("epochs = 50", "epochs = 1").replace('"1:8"', '"1:2"')
        (folder / name).write_text(small.replace("size = 64", "size = 32").replace("= 128", "= 32"))
    store = S3FileSystem(endpoint_override=s3.variables["AWS_ENDPOINT_URL"], allow_bucket_creation=True)
    store.create_dir("my-bucket")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield folder
        diptych("cluster", "down")


@pytest.mark.ray
@pytest.mark.slow
def test_commands_do_what_the_page_says(home: Path) -> None:
    import ray

    there = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    own = False
    for line in lines():
        if line.startswith("diptych "):
            own = own or line.startswith("diptych cluster up")
            done = diptych(*shortened(line), cwd=home, **({} if own else there))
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            own = own and not line.startswith("diptych cluster down")
    assert (home / "preview.png").stat().st_size > 10_000
    assert (home / "runs" / "first" / "report.html").is_file()
    assert (home / "resnet18.pt").is_file()
    shards = [pq.read_table(path) for path in (home / "features").glob("*.parquet")]
    assert sum(len(shard) for shard in shards) == 320
    assert (home / "runs" / "best" / "config.toml").is_file()


@pytest.mark.ray
@pytest.mark.slow
def test_the_experiment_shows_the_promise(home: Path) -> None:
    import ray

    (line,) = (line for line in lines() if line.startswith("python "))
    environment = {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    done = subprocess.run(
        [sys.executable, *shortened(line)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = re.findall(r"^(\S.*?)  .* (\d\.\de[+-]\d\d) +\S+%$", done.stdout, re.MULTILINE)
    off = {name: float(value) for name, value in rows}
    assert off.keys() == {"1", "4, killed, then 1", "2, not exact", "2, another seed"}
    assert off["1"] == off["4, killed, then 1"] == 0 < off["2, not exact"]
    assert off["2, another seed"] > 1e-3


def test_the_two_commands_are_targets_that_run_the_demo_and_the_tests() -> None:
    for line, runs in (
        ("make demo", "diptych demo"),
        ("make test", "-m 'not slow'"),
        ("make test-slow", "-m slow"),
        ("make docs", "-m sphinx"),
    ):
        done = subprocess.run(
            ["make", "-n", line.split()[1]], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert runs in done.stdout
    assert {line.split("#")[0].strip() for line in lines() if line.startswith("make")} == {
        "make demo",
        "make test",
    }


def test_files_that_the_page_names_exist() -> None:
    named = set(re.findall(r"\]\(((?!http)[^)#]+)\)", README)) | set(
        re.findall(r"^(\w+)/  ", README, re.MULTILINE)
    )
    assert len(named) > 15
    assert not [name for name in named if not (ROOT / name).exists()]
