"""diptych tune: a real search of real runs on the session's cluster."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.digits import scattered_digits
from pipelines.shards import write_shards
from training.config import TrainConfig, config_hash
from training.cost import encoder_cost
from training.encoder_config import EncoderConfig

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


def test_status_and_best_tell_of_a_search_and_resume_goes_on_with_it(
    search: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    main(["tune", "status", str(search)])
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "2 of 2 trials have begun"
    assert all("temperature=" in line and "batch_size=" in line for line in said[:2])
    main(["tune", "best", str(search), "--output", str(tmp_path / "best.toml")])
    assert (tmp_path / "best.toml").read_text() == (search / "best.toml").read_text()
    unjudged = tmp_path / "moved"  # A search that was killed before its end, and moved.
    shutil.copytree(search, unjudged)
    (unjudged / "trials.jsonl").unlink()
    (unjudged / "best.toml").unlink()
    main(["tune", "best", str(unjudged), "-o", str(tmp_path / "again.toml")])
    found = TrainConfig(**tomllib.loads((tmp_path / "again.toml").read_text()))
    assert (
        config_hash(found)
        == Path(json.loads((search / "trials.jsonl").read_text().splitlines()[0])["run"]).name
    )
    main(["tune", "resume", str(unjudged)])
    runs = [json.loads(line)["run"] for line in (unjudged / "trials.jsonl").read_text().splitlines()]
    assert [Path(run).parents[1] for run in runs] == [unjudged, unjudged]


@pytest.mark.parametrize("command", ["status", "best", "resume"])
def test_what_is_no_search_is_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["tune", command, str(tmp_path)])
    assert capsys.readouterr().err == (
        f"diptych: {tmp_path} is no search: there is no search.toml; give OUTPUT/NAME of one\n"
    )


COMPOUND = """
scheduler = "none"
searcher = "tpe"
compound = true
held_out = 0.25
output = "{output}"

[train]
lanes = 4
steps = 2
batch_size = 16

[train.data]
train = "{images}"
recipe = "simclr-cifar"
view = {{ size = 32 }}

[train.encoder]
name = "efficientnet-b0"

[train.projector]
hidden_dim = 32
dim = 16
"""


def test_compound_coefficients_are_searched_on_their_surface_and_the_best_can_be_scaled(
    search: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    images = search.parents[1] / "images"
    (tmp_path / "grow.toml").write_text(COMPOUND.format(output=tmp_path / "runs", images=images))
    main(["tune", str(tmp_path / "grow.toml"), "--trials", "2"])
    lines = (tmp_path / "runs" / "grow" / "trials.jsonl").read_text().splitlines()
    trials = [json.loads(line) for line in lines]
    assert len({trial["run"] for trial in trials}) == 2
    for trial in trials:
        alpha, beta, gamma = (trial["values"][f"encoder.{name}"] for name in ("alpha", "beta", "gamma"))
        assert alpha * beta**2 * gamma**2 == pytest.approx(2)
        config = TrainConfig(**tomllib.loads((Path(trial["run"]) / "config.toml").read_text()))
        assert (config.encoder.alpha, config.encoder.phi) == (alpha, 1.0)
        assert config.data.view.size == round(32 * gamma)
        cost = encoder_cost(config.encoder, config.data.view.size).multiply_adds
        assert trial["multiply_adds"] == cost
        target = 2 * encoder_cost(EncoderConfig(name="efficientnet-b0"), 32).multiply_adds
        assert trial["score"] == pytest.approx(trial["knn_top1"] * (cost / target) ** -0.07)
    assert trials[0]["score"] >= trials[1]["score"]
    main(["scale", str(tmp_path / "runs/grow/best.toml"), "--output", str(tmp_path / "family"), "--phi", "0"])
    assert "of phi 0's" in capsys.readouterr().out


def test_grid_tries_every_combination_once(search: Path, tmp_path: Path) -> None:
    content = SEARCH.format(output=tmp_path / "runs", images=search.parents[1] / "images")
    content = content.replace("loguniform = [0.1, 1.0]", "choice = [0.2, 0.4]").replace("[16, 32]", "[32]")
    (tmp_path / "grid.toml").write_text('searcher = "grid"\n' + content)
    main(["tune", str(tmp_path / "grid.toml")])
    lines = (tmp_path / "runs" / "grid" / "trials.jsonl").read_text().splitlines()
    tried = sorted(json.loads(line)["values"]["temperature"] for line in lines)
    assert tried == [0.2, 0.4]
