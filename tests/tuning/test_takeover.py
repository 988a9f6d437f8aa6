"""A search that another process has taken over, while its own was halted, writes nothing more."""

import os
from pathlib import Path
from typing import Any

import pytest
from folders import digit_folders
from leases import held_there, holder, taken_over

from cluster.tune import _check
from pipelines import storage
from pipelines.index import build_index
from training import lease
from training.errors import RunError
from tuning.config import SearchConfig
from tuning.search import _Shared, _Trial, search_sets
from tuning.trial_config import search_folder
from tuning.trials import TrialLog


@pytest.fixture(autouse=True)
def _short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(lease, "_EXPIRY_SECONDS", 0.5)


def _search(folder: Path) -> SearchConfig:
    train: dict[str, Any] = {
        "data": {"train": str(folder / "train"), "recipe": "simclr-cifar", "view": {"size": 16}},
        "encoder": {"name": "resnet8"},
        "batch_size": 8, "lanes": 2, "steps": 2,
    }  # fmt: skip
    space = {"temperature": {"uniform": [0.1, 0.5]}}
    return SearchConfig(space=space, scheduler="none", output=str(folder), name="search", train=train)


def test_a_search_writes_nothing_once_another_process_has_taken_it_over(tmp_path: Path) -> None:
    search = _search(tmp_path)
    folder, results = search_folder(search), {"images": 16, "accuracy": 0.5, "score": 0.5}
    with holder(folder, "another machine") as driver:
        shown, held = [], held_there(folder)
        log = TrialLog(search, shown.append, held)
        log.start("a", {"temperature": 0.2})
        _check(held)
        with taken_over(folder, driver) as their_lease:
            theirs = TrialLog(search, lambda trials: None, their_lease)
            theirs.start("b", {"temperature": 0.3})
            before, calls = storage.read(f"{folder}/trials.jsonl"), len(shown)
            assert not log.taken_over
            log.record("a", **results)
            assert log.taken_over
            log.end("a", "finished")
            assert [trial.state for trial in log.close()] == ["finished"]
            assert storage.read(f"{folder}/trials.jsonl") == before
            assert len(shown) == calls
            with pytest.raises(RunError, match=rf"^process {os.getpid()} on .* has taken {folder} over; "):
                _check(held)
            theirs.record("b", **results)
            assert storage.read(f"{folder}/trials.jsonl") != before


def test_a_trial_begins_nothing_once_another_process_has_taken_its_search_over(tmp_path: Path) -> None:
    digit_folders(tmp_path / "train", 49)
    search = _search(tmp_path)
    sets = search_sets(search, build_index(search.train.data.train, search.train.data))
    folder = search_folder(search)
    with holder(folder, "another machine") as driver:
        trial = _Trial.__new__(_Trial)  # As Ray Tune would, of which this process has no cluster.
        trial.setup({"temperature": 0.2}, _Shared(search, sets, {}, held_there(folder)))
        with taken_over(folder, driver):
            found = trial.step()
            assert found.pop("failure").startswith(f"process {os.getpid()} on ")
            assert found == {"done": True}
            assert storage.names(folder) == ["lease.json"]
