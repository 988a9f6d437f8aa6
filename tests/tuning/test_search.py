"""diptych tune: a real search of real runs on the session's cluster."""

import json
import tomllib
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.digits import scattered_digits
from pipelines.shards import write_shards
from training.config import TrainConfig, config_hash

pytestmark = pytest.mark.ray

SEARCH = """
scheduler = "none"
held_out = 0.25
output = "{output}"

[space]
temperature = {{ loguniform = [0.1, 1.0] }}
batch_size = {{ choice = [16, 32] }}

[train]
lanes = 4
epochs = 1

[train.data]
train = "{images}"
recipe = "simclr-cifar"

[train.encoder]
name = "resnet8"

[train.projector]
hidden_dim = 32
dim = 16
"""


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """The folder that a search of two trials has left."""
    folder = tmp_path_factory.mktemp("search")
    images = scattered_digits(160, held_out=False, seed=0)
    write_shards(images, str(folder / "images"), rows_per_shard=80, rows_per_group=20)
    (folder / "small.toml").write_text(SEARCH.format(output=folder / "runs", images=folder / "images"))
    main(["tune", str(folder / "small.toml"), "--trials", "2"])
    return folder / "runs" / "small"


def test_each_trial_is_a_run_named_by_its_config(search: Path) -> None:
    trials = [json.loads(line) for line in (search / "trials.jsonl").read_text().splitlines()]
    assert len(trials) == 2
    for trial in trials:
        config = TrainConfig(**tomllib.loads((Path(trial["run"]) / "config.toml").read_text()))
        assert config_hash(config) == Path(trial["run"]).name
        assert config.temperature == pytest.approx(trial["values"]["temperature"])
        assert config.batch_size == trial["values"]["batch_size"]


def test_trials_are_ranked_by_their_last_accuracy_on_held_out_images(search: Path) -> None:
    trials = [json.loads(line) for line in (search / "trials.jsonl").read_text().splitlines()]
    for trial in trials:
        lines = [json.loads(line) for line in (Path(trial["run"]) / "metrics.jsonl").read_text().splitlines()]
        assert trial["knn_top1"] == [line["knn_top1"] for line in lines if "knn_top1" in line][-1]
        # 120 of the 160 images are trained on; 40 are held out.
        assert trial["images"] == 120 // trial["values"]["batch_size"] * trial["values"]["batch_size"]
    assert trials[0]["knn_top1"] >= trials[1]["knn_top1"]


def test_best_config_is_the_first_trials_and_trains_as_it_is(search: Path) -> None:
    best = TrainConfig(**tomllib.loads((search / "best.toml").read_text()))
    first = json.loads((search / "trials.jsonl").read_text().splitlines()[0])
    assert config_hash(best) == Path(first["run"]).name
    assert best.name == "small-best"


def test_search_that_is_repeated_runs_no_trial_again(search: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in search.rglob("checkpoints/*.pt")}
    trials = (search / "trials.jsonl").read_text()
    main(["tune", str(search.parents[1] / "small.toml"), "--trials", "2"])
    assert (search / "trials.jsonl").read_text() == trials
    assert {path: path.stat().st_mtime_ns for path in search.rglob("checkpoints/*.pt")} == before
