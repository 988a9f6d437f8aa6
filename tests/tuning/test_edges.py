"""Searches at the edges: choices that are lists, batch sizes, other runs' checkpoints."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from folders import digit_folders

from cluster.tune import _keep, _modules, print_status, run_tuning, with_checkpoints
from pipelines import storage
from pipelines.index import build_index
from pipelines.reader import read_windows
from training.checkpoint import Checkpoints
from training.config import TrainConfig
from training.evaluation.evaluator import Sets
from training.gather import LocalGather
from training.models.encoders import build_encoder
from training.process import Worker
from training.run_folder import claim_run, read_config
from training.trainer import run_uri, train
from tuning.config import SearchConfig
from tuning.report import write_search_report
from tuning.searcher import SCORE, PointSearcher, TrialSlots
from tuning.space import Point
from tuning.trial_config import search_folder, search_space, trial_config
from tuning.trials import Trial, TrialLog, read_trials

_LISTS: dict[str, Any] = {
    "data.view.crop_scale": {"choice": [[0.2, 1.0], [0.5, 1.0], [0.08, 0.9]]},
    "encoder.name": {"choice": ["resnet8", "resnet14"]},
}


def _search(output: Path, space: dict[str, Any], **fields: Any) -> SearchConfig:
    values: dict[str, Any] = {
        "data": {"train": str(output / "train"), "view": {"size": 16, "blur": 0.0}, "window_rows": 12},
        "encoder": {"name": "resnet8"}, "projector": {"hidden_dim": 32, "dim": 16}, "lanes": 4,
        "batch_size": 24, "optimizer": {"name": "sgd"}, "evaluation": {"every_epochs": 1},
    }  # fmt: skip
    given: dict[str, Any] = {"scheduler": "none", "output": str(output), **fields}
    given["train"] = {**values, **given.get("train", {})}
    return SearchConfig(space=space, **given)


def _searched(search: SearchConfig, points: list[Point]) -> list[Trial]:
    """The trials of a search's log, of these points, each trained to the end."""
    log = TrialLog(search, lambda trials: None)
    for number, point in enumerate(points):
        key, accuracy = f"trial_{number}", 0.1 * (number + 1)
        log.start(key, point)
        log.record(key, images=96, accuracy=accuracy, score=accuracy)
        log.end(key, "finished")
    return log.close()


def test_a_choice_of_lists_is_reported_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = _search(tmp_path, _LISTS, trials=4)
    _keep(search)
    trials = _searched(search, search.points(search_space(search)))
    assert len({json.dumps(trial.values) for trial in trials}) == 4
    page = Path(write_search_report(search, trials)).read_text()
    body = page[page.index("<tbody>") : page.index("</tbody>")]
    cells = set(re.findall(r">(\[[^<]*\])<", body))
    assert cells == {str(trial.values["data.view.crop_scale"]) for trial in trials}
    print_status(search_folder(search))
    shown = capsys.readouterr().out
    assert all(cell in shown for cell in cells)
    assert read_trials(search_folder(search)) == trials


@pytest.mark.parametrize("form", [list, tuple])
def test_tpe_learns_from_lists_and_resumes_with_what_was_written_of_them(form: Any, tmp_path: Path) -> None:
    choices = [form(value) for value in _LISTS["data.view.crop_scale"]["choice"]]
    space = {"data.view.crop_scale": {"choice": choices}, "temperature": {"uniform": [0.1, 0.5]}}
    search = _search(tmp_path, space, searcher="tpe", trials=6)

    def suggested(first: list[Point]) -> list[Point]:
        searcher, points = PointSearcher(search, first, TrialSlots(1)), []
        for number in range(6):
            points.append(searcher.suggest(f"t_{number}"))
            searcher.on_trial_complete(f"t_{number}", {SCORE: points[-1]["data.view.crop_scale"][0]})
        return points

    points = suggested([])
    assert all(point["data.view.crop_scale"] in _LISTS["data.view.crop_scale"]["choice"] for point in points)
    assert len({json.dumps(point) for point in points}) == 6
    assert suggested(json.loads(json.dumps(points[:3]))) == points


def test_tpe_tries_all_combinations_where_there_are_few(tmp_path: Path) -> None:
    searcher = PointSearcher(_search(tmp_path, _LISTS, searcher="tpe", trials=8), [], TrialSlots(1))
    points: list[Point] = []
    while point := searcher.suggest(f"t_{len(points)}"):
        searcher.on_trial_complete(f"t_{len(points)}", {SCORE: point["data.view.crop_scale"][0]})
        points.append(point)
    assert len({json.dumps(point) for point in points}) == len(points) == 6


def test_a_grid_of_lists_has_each_combination(tmp_path: Path) -> None:
    search = _search(tmp_path, _LISTS, searcher="grid")
    views = [
        trial_config(search, point).data.view.crop_scale for point in search.points(search.distributions)
    ]
    assert sorted(views) == sorted([(0.2, 1.0), (0.5, 1.0), (0.08, 0.9)] * 2)


# The divisors of each case's batch sizes: lanes are 4 in the base config.
@pytest.mark.parametrize(
    ("space", "fields", "step"),
    [
        ({"batch_size": {"integers": [32, 64]}}, {}, 4),
        ({"batch_size": {"integers": [32, 64]}, "lanes": {"choice": [4, 16]}}, {}, 16),
        ({"batch_size": {"integers": [24, 96]}}, {"micro_batch_size": 12}, 12),
        ({"batch_size": {"integers": [24, 96]}, "micro_batch_size": {"choice": [8, 12]}}, {}, 24),
    ],
)
@pytest.mark.parametrize("searcher", ["random", "grid", "tpe"])
def test_batch_sizes_are_drawn_in_steps_of_what_must_divide_them(
    space: dict[str, Any], fields: dict[str, Any], step: int, searcher: Any, tmp_path: Path
) -> None:
    search = _search(tmp_path, space, searcher=searcher, trials=8, train=fields)
    low, high = space["batch_size"]["integers"]
    if searcher == "tpe":
        tpe = PointSearcher(search, [], TrialSlots(8))
        points = [tpe.suggest(f"t_{number}") for number in range(8)]
        points = [point for point in points if point]
    else:
        points = search.points(search.distributions)
    sizes = {point["batch_size"] for point in points}
    assert sizes <= set(range(low, high + 1, step))
    assert len(sizes) > 1
    for point in points:
        config = trial_config(search, point)
        assert config.batch_size % config.lanes == 0
    if searcher == "grid":
        assert sizes == set(range(low, high + 1, step))


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"batch_size": {"integers": [30, 64]}}, r"=\[30, 64\] must be multiples of 4, .*; try \[32, 64\]"),
        ({"batch_size": {"integers": [30, 62]}}, r"=\[30, 62\] must be multiples of 4, .*; try \[32, 60\]"),
        ({"batch_size": {"integers": [1, 3]}}, r"=\[1, 3\] must be multiples of 4, .*; try \[4, 8\]"),
        ({"batch_size": {"choice": [24, 48]}, "lanes": {"choice": [4, 8, 24]}},
         None),
        ({"batch_size": {"choice": [24, 36]}, "lanes": {"choice": [4, 8]}},
         r"space: lanes=8, batch_size=36: batch_size=36 must be a multiple of lanes=8"),
        ({"lanes": {"integers": [2, 4]}, "batch_size": {"choice": [24, 32]}},
         r"space: lanes=3, batch_size=32"),
        ({"micro_batch_size": {"integers": [4, 12]}}, r"micro_batch_size=5: micro_batch_size=5 must be"),
        ({"batch_size": {"uniform": [24, 48]}}, r"space: batch_size=31.*valid integer"),
        ({"epochs": {"loguniform": [1, 100]}}, r"space: epochs=32.*valid integer"),
    ],
)  # fmt: skip
def test_batches_that_cannot_be_are_refused(space: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    if said is None:
        assert _search(tmp_path, space)
        return
    with pytest.raises(ValueError, match=said):
        _search(tmp_path, space)


def test_steps_of_one_draw_what_they_drew_before(tmp_path: Path) -> None:
    import random

    search = _search(tmp_path, {"seed": {"integers": [3, 500]}}, trials=5)
    generator = random.Random(search.seed)
    expected = [{"seed": generator.randint(3, 500)} for _ in range(5)]
    assert search.points(search.distributions) == expected


def _run(folder: Path, name: str, *steps: int, encoder: str = "resnet8") -> None:
    """A run that has checkpoints of these steps."""
    fields: dict[str, Any] = {"data": {"train": "/images"}, "encoder": {"name": encoder}}
    config = TrainConfig(**fields)
    torch.manual_seed(len(name))
    model = torch.nn.ModuleDict({"encoder": build_encoder(config.encoder)})
    run = str(folder / name)
    claim_run(run, config)
    for step in steps:
        Checkpoints(run, 9).save(step, model, torch.optim.SGD(model.parameters()), config)


def test_trials_start_from_the_runs_that_a_space_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "bb"):
        _run(tmp_path / "runs", name, 5, 10)
    monkeypatch.chdir(tmp_path)
    digit_folders(tmp_path / "train", 49)
    newest, older = (f"{tmp_path}/runs/{name}" for name in ("a/checkpoints/step-000000010.pt",
                                                            "bb/checkpoints/step-000000005.pt"))  # fmt: skip
    space = with_checkpoints(
        {
            "init": {"choice": ["runs/a", "runs/bb/checkpoints/step-000000005.pt"]},
            "temperature": {"uniform": [0.1, 0.5], "when": {"init": "runs/a"}},
            "optimizer": {"momentum": {"choice": [0.5, 0.9], "when": {"init": ["runs/a/"]}}},
        }
    )
    assert space["init"] == {"choice": [newest, older]}
    assert space["temperature"]["when"] == {"init": newest}
    assert space["optimizer"]["momentum"]["when"] == {"init": [newest]}
    assert with_checkpoints(space) == space
    search = _search(tmp_path, space, train={"steps": 1, "evaluation": {"diagnostic_images": 0}})
    points = search.points(search.distributions)
    assert {point["init"]: set(point) for point in points} == {
        newest: {"init", "temperature", "optimizer.momentum"},
        older: {"init"},
    }
    config = trial_config(search, next(point for point in points if point["init"] == older))
    worker = Worker(gather=LocalGather(), device=torch.device("cpu"), threads=1, tables=read_windows)
    claim_run(run_uri(config), config)
    train(config, Sets(build_index(config.data.train, config.data), None, None), worker, lambda _: None)
    assert read_config(run_uri(config)).init == older
    theirs = Checkpoints(f"{tmp_path}/runs/bb", 9).load(5)["model"]
    ours = Checkpoints(run_uri(config), 9).load(1)["model"]
    assert ours.keys() >= theirs.keys()


@pytest.mark.parametrize(
    ("init", "said"),
    [
        ("runs/nowhere", "runs/nowhere has no checkpoint; give OUTPUT/NAME of a run"),
        ("runs/a/checkpoints/step-000000007.pt", "there is no checkpoint .*7.pt; give --init a run"),
        ("runs/damaged", r"runs/damaged/checkpoints/step-000000005.pt is damaged: "),
        ("runs/larger", "resnet14, does not fit this run's: set the same --encoder fields"),
    ],
)
@pytest.mark.parametrize("key", ["space", "train"])
def test_a_checkpoint_that_trials_cannot_start_from_is_named_before_anything_starts(
    key: str, init: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(tmp_path / "runs", "a", 5)
    _run(tmp_path / "runs", "larger", 5, encoder="resnet14")
    _run(tmp_path / "runs", "damaged", 5)
    (tmp_path / "runs/damaged/checkpoints/step-000000005.pt").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    temperature = {"temperature": {"uniform": [0.1, 0.5]}}
    if key == "space":
        search = _search(tmp_path, {"init": {"choice": ["runs/a", init]}})
    else:
        search = _search(tmp_path, temperature, train={"init": init})
    with pytest.raises(ValueError, match=said):
        run_tuning(search)
    assert not ray.is_initialized()
    assert not storage.exists(search_folder(search))


def test_objectives_of_ones_own_that_are_searched_come_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("searched_one", "searched_two"):
        code = "from training import Objective\n\nclass Mine(Objective):\n    pass\n"
        (tmp_path / f"{name}.py").write_text(code)
    choice = ["searched_one:Mine", "simclr", "searched_two:Mine"]
    search = _search(tmp_path, {"objective": {"choice": choice}}, train={"projector": {}})
    assert _modules(search) == [tmp_path / "searched_one.py", tmp_path / "searched_two.py"]
