"""diptych tune: real searches of real runs on the session's cluster."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import ray
import tomli_w
from ray.tune.execution import class_cache

from cluster.cli.main import main
from cluster.digits import scattered_digits
from pipelines.shards import write_shards
from training.config import TrainConfig, config_hash
from training.config.encoder import EncoderConfig
from training.models.encoders import encoder_cost
from tuning.search import keep_keys_out_of_runtime_environments

pytestmark = pytest.mark.ray

SPACE: dict[str, Any] = {
    "temperature": {"loguniform": [0.1, 1.0]},
    "batch_size": {"choice": [16, 32]},
}
TRAIN: dict[str, Any] = {
    "lanes": 4,
    "encoder": {"name": "resnet8"},
    "projector": {"hidden_dim": 32, "dim": 16},
}
# A key that must not be logged.
_PLANTED = "planted-session-token"
# Diagnostics are for the tests of runs.
EACH_EPOCH = {"every_epochs": 1, "diagnostic_images": 0}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """160 labelled images in 8 row groups."""
    folder = tmp_path_factory.mktemp("digits") / "images"
    write_shards(
        scattered_digits(160, held_out=False, seed=0), str(folder), rows_per_shard=80, rows_per_group=20
    )
    return folder


@pytest.fixture(scope="module")
def search(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a search of three trials has left; its file lies beside it."""
    folder = tmp_path_factory.mktemp("search")
    file = _write_search(
        folder / "deep.toml", images, scheduler="asha", searcher="tpe", trials=3, seed=1,
        train={"epochs": 2, "evaluation": EACH_EPOCH},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_SESSION_TOKEN", _PLANTED)
        main(["tune", str(file)])
    return folder / "deep"


def _write_search(
    file: Path, images: Path, *, space: dict[str, Any] = SPACE, train: dict[str, Any], **fields: Any
) -> Path:
    """The file of a search that is written beside it, with `train` beside or in place of what is in TRAIN."""
    data = {"train": str(images), "recipe": "simclr-cifar"}
    values = {"scheduler": "none", "held_out": 0.25, "output": str(file.parent), "space": space, **fields}
    file.write_text(tomli_w.dumps(values | {"train": {**TRAIN, "data": data, **train}}))
    return file


def _trials(search: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (search / "trials.jsonl").read_text().splitlines()]


def _config(run: Path) -> TrainConfig:
    return TrainConfig(**tomllib.loads((run / "config.toml").read_text()))


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in _lines(run) if "loss" in line}


def _saved(search: Path) -> dict[str, int]:
    return {
        str(path.relative_to(search)): path.stat().st_mtime_ns for path in search.rglob("checkpoints/*.pt")
    }


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_each_trial_is_a_run_named_by_its_config(search: Path) -> None:
    trials = _trials(search)
    assert len({trial["run"] for trial in trials}) == 3
    for trial in trials:
        config = _config(search / trial["run"])
        assert config_hash(config) == Path(trial["run"]).name
        assert config.temperature == pytest.approx(trial["values"]["temperature"])
        assert config.batch_size == trial["values"]["batch_size"]


def test_trials_are_ranked_by_their_last_accuracy_on_held_out_images(search: Path) -> None:
    trials = _trials(search)
    for trial in trials:
        found = [line["knn_top1"] for line in _lines(search / trial["run"]) if "knn_top1" in line]
        assert trial["accuracy"] == trial["score"] == found[-1]
        # 120 of the 160 images are trained on; 40 are held out.
        epoch = 120 // trial["values"]["batch_size"] * trial["values"]["batch_size"]
        assert trial["images"] == epoch * {"finished": 2, "stopped early": 1}[trial["state"]]
    accuracies = [trial["accuracy"] for trial in trials]
    assert accuracies == sorted(accuracies, reverse=True)


def test_the_best_trial_after_an_evaluation_continues_alone(search: Path) -> None:
    trials = sorted(_trials(search), key=lambda trial: trial["number"])
    # Three are too few for a quarter: the best of them continues once all have paused.
    first = [trial["results"][0]["accuracy"] for trial in trials]
    (finished,) = (trial for trial in trials if trial["state"] == "finished")
    assert finished["results"][0]["accuracy"] == max(first)


def test_best_config_is_the_first_trials_and_trains_as_it_is(search: Path) -> None:
    best = TrainConfig(**tomllib.loads((search / "best.toml").read_text()))
    assert config_hash(best) == Path(_trials(search)[0]["run"]).name
    assert best.name == "deep-best"


def test_a_search_leaves_one_page_of_its_trials_that_needs_no_network(search: Path) -> None:
    page = (search / "report.html").read_text()
    for trial in _trials(search):
        assert trial["run"] in page
        assert f"{trial['values']['temperature']:.4g}" in page
    # plotly's own code names addresses, which it does not load.
    outside = re.sub("<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)=["']?https?:|url\(["']?https?:|@import""", outside)
    assert (
        len(re.findall('id="figure-', page)) == 6
    )  # Two of the best so far, two keys, and two of all trials.


def test_no_key_of_this_process_is_in_rays_logs(search: Path) -> None:
    logs = Path(ray.nodes()[0]["ObjectStoreSocketName"]).parents[1] / "logs"
    said = "".join(path.read_text(errors="replace") for path in logs.rglob("*") if path.is_file())
    assert "PL_DISABLE_FORK" in said  # Tune's variables for its trials are there.
    assert _PLANTED not in said


def test_a_ray_without_the_private_list_of_keys_keeps_tunes_default(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(class_cache.ENV_VARS_TO_PROPAGATE)
    monkeypatch.delattr(class_cache, "ENV_VARS_TO_PROPAGATE")
    keep_keys_out_of_runtime_environments()
    monkeypatch.undo()
    assert before == class_cache.ENV_VARS_TO_PROPAGATE
    keep_keys_out_of_runtime_environments()
    assert not [name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")]


def test_status_and_best_tell_of_a_search(
    search: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    main(["tune", "status", str(search)])
    said = capsys.readouterr().out
    assert "3 of 3 trials have ended" in said
    assert said.count("finished") == 1
    assert said.count("stopped early") == 2
    assert "temperature" in said
    assert "batch_size" in said
    main(["tune", "best", str(search), "--output", str(tmp_path / "best.toml")])
    assert (tmp_path / "best.toml").read_text() == (search / "best.toml").read_text()


def test_search_that_is_repeated_runs_no_trial_again(search: Path) -> None:
    before, trials = _saved(search), _trials(search)
    main(["tune", str(search.parent / "deep.toml")])
    assert (_trials(search), _saved(search)) == (trials, before)


def test_resume_runs_no_trial_of_a_search_that_was_moved_again(search: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(search, moved)
    before, trials = _saved(moved), _trials(moved)
    main(["tune", "resume", str(moved)])
    assert (_trials(moved), _saved(moved)) == (trials, before)


def test_a_search_whose_driver_is_killed_resumes_with_the_same_trials(
    search: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    killed = tmp_path / "deep"
    arguments = ["tune", str(search.parent / "deep.toml"), "--output", str(tmp_path)]
    command = [sys.executable, "-c", f"from cluster.cli.main import main; main({arguments!r})"]
    address = ray.get_runtime_context().gcs_address
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"RAY_ADDRESS": address})
    try:
        while _text(killed / "trials.jsonl").count('"results": [{') < 2:
            assert driver.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
    finally:
        driver.kill()
        driver.wait()
    judged = [trial["run"] for trial in _trials(killed) if trial["results"]]
    assert "finished" not in {trial["state"] for trial in _trials(killed)}
    before = {path: time for path, time in _saved(killed).items() if any(run in path for run in judged)}
    main(["tune", "status", str(killed)])
    assert "of 3 trials have ended" in capsys.readouterr().out
    main(["tune", "resume", str(killed)])
    assert before.items() <= _saved(killed).items()
    for one, other in zip(_trials(search), _trials(killed), strict=True):
        for key in ("number", "run", "values", "state", "accuracy"):
            assert one[key] == other[key]
        assert _losses(search / one["run"]) == _losses(killed / other["run"])


@pytest.mark.parametrize("command", ["status", "best", "resume"])
def test_what_is_no_search_is_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["tune", command, str(tmp_path)])
    assert capsys.readouterr().err == (
        f"diptych: {tmp_path} is not a search: there is no search.toml; give OUTPUT/NAME of one\n"
    )


def test_a_trial_that_can_never_fit_is_refused_before_any_begins(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cpus = int(ray.cluster_resources()["CPU"])
    # As many workers as there are CPUs, of which each needs two.
    file = _write_search(
        tmp_path / "wide.toml", images, space={"temperature": SPACE["temperature"]},
        train={"workers": cpus, "lanes": cpus, "batch_size": cpus},
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(["tune", str(file)])
    assert ended.value.code == 2
    assert f"workers={cpus} need {2 * cpus} CPUs of the cluster, which has {cpus}" in capsys.readouterr().err
    assert not (tmp_path / "wide" / "trials.jsonl").exists()


@pytest.mark.slow
def test_compound_coefficients_are_searched_on_their_surface_and_the_best_can_be_scaled(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = _write_search(
        tmp_path / "grow.toml", images, space={}, searcher="tpe", compound=True, trials=2,
        train={
            "steps": 1,
            "batch_size": 16,
            "data": {"train": str(images), "recipe": "simclr-cifar", "view": {"size": 100}},
            "encoder": {"name": "efficientnet-b0"},
            "evaluation": {"diagnostic_images": 0},
        },
    )  # fmt: skip
    main(["tune", str(file)])
    grow = tmp_path / "grow"
    trials = _trials(grow)
    assert len({trial["run"] for trial in trials}) == 2
    for trial in trials:
        alpha, beta, gamma = (trial["values"][f"encoder.{name}"] for name in ("alpha", "beta", "gamma"))
        assert alpha * beta**2 * gamma**2 == pytest.approx(2)
        config = _config(grow / trial["run"])
        assert (config.encoder.alpha, config.encoder.phi) == (alpha, 1.0)
        assert config.data.view.size == round(100 * gamma)
        cost = encoder_cost(config.encoder, config.data.view.size).multiply_adds
        assert trial["multiply_adds"] == cost
        target = 2 * encoder_cost(EncoderConfig(name="efficientnet-b0"), 100).multiply_adds
        assert 0.9 <= cost / target <= 1.1
        assert trial["score"] == pytest.approx(trial["accuracy"] * (cost / target) ** -0.07)
    assert trials[0]["score"] >= trials[1]["score"]
    assert 'id="figure-cost"' in (grow / "report.html").read_text()
    main(["scale", str(grow / "best.toml"), "--output", str(tmp_path / "family"), "--phi", "0"])
    assert "of phi 0's" in capsys.readouterr().out


@pytest.mark.slow
def test_grid_tries_each_combination_once_where_there_is_room_and_marks_what_fails(
    images: Path, tmp_path: Path, pool: Any
) -> None:
    pool.close()
    # Four may run at a time, but the two workers of each need three fifths of the cluster's CPUs: three wait.
    file = _write_search(
        tmp_path / "grid.toml", images, searcher="grid", metric="linear", concurrent=4,
        space={
            "optimizer": {"learning_rate": {"choice": [0.02, 1e30]}},
            "batch_size": {"choice": [24, 128]},
        },
        train={
            "steps": 5,
            "workers": 2,
            "cpus_per_worker": 0.3 * ray.cluster_resources()["CPU"],
            "optimizer": {"name": "sgd"},
            "evaluation": {"diagnostic_images": 0},
        },
    )  # fmt: skip
    running, over = [], Event()
    looking = Thread(target=_count_running, args=(tmp_path / "grid" / "trials.jsonl", running, over))
    looking.start()
    try:
        main(["tune", str(file)])
    finally:
        over.set()
        looking.join()
    assert max(running) == 1
    trials = _trials(tmp_path / "grid")
    found = {
        (trial["values"]["optimizer.learning_rate"], trial["values"]["batch_size"]): trial for trial in trials
    }
    assert len(trials) == len(found) == 4
    assert [trial["state"] for trial in trials] == ["finished", "failed", "failed", "failed"]
    assert trials[0] == found[0.02, 24]
    assert "linear_top1" in _lines(tmp_path / "grid" / trials[0]["run"])[-1]
    assert "not finite" in found[1e30, 24]["error"]
    # 120 images fill no batch of 128.
    assert all("batch_size=128" in found[rate, 128]["error"] for rate in (0.02, 1e30))


@pytest.mark.slow
def test_a_search_ends_in_time_or_when_interrupted_and_is_resumed(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = _write_search(
        tmp_path / "short.toml", images, trials=2, max_minutes=0.01,
        train={"epochs": 2, "evaluation": EACH_EPOCH},
    )  # fmt: skip
    with pytest.raises(SystemExit):
        main(["tune", str(file)])
    assert "was evaluated: there was no time for one" in capsys.readouterr().err
    short = tmp_path / "short"
    kept = (short / "search.toml").read_text()
    (short / "search.toml").write_text(re.sub("max_minutes = 0.01\n|# crc32: .*\n", "", kept))
    judged = re.compile('"accuracy": [0-9.]')
    interrupting = Thread(
        target=_interrupt_once, args=(lambda: judged.search(_text(short / "trials.jsonl")),)
    )
    interrupting.start()
    with pytest.raises(SystemExit) as ended:
        main(["tune", "resume", str(short)])
    interrupting.join()
    assert ended.value.code == 128 + signal.SIGINT
    assert f"diptych: stopped; resume with: diptych tune resume {short}" in capsys.readouterr().err
    assert "unfinished" in {trial["state"] for trial in _trials(short)}
    main(["tune", "resume", str(short)])
    assert [trial["state"] for trial in _trials(short)] == ["finished"] * 2


def _interrupt_once(condition: Callable[[], Any]) -> None:
    """Press Ctrl-C when the condition holds."""
    while not condition():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)


def _count_running(trials: Path, counts: list[int], over: Event) -> None:
    """Note again and again how many trials run."""
    while not over.wait(0.1):
        counts.append(_text(trials).count('"state": "running"'))
