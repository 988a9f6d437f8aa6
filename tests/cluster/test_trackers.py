"""MLflow and Weights & Biases, with their real clients and stores on this machine's disk."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cluster.trackers import Trackers, check_trackers, open_trackers
from pipelines.config import DataConfig
from training.config import TrainConfig

_LINE = {"step": 3, "steps": 8, "epoch": 1, "loss": 2.5, "learning_rate": 0.1, "warning": "none"}


def _config(tmp_path: Path, *trackers: str) -> TrainConfig:
    data = DataConfig(train=str(tmp_path / "images"))
    return TrainConfig(data=data, output=str(tmp_path), trackers=trackers)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    return MlflowClient()


def test_mlflow_has_the_numbers_and_the_config_and_a_resumed_run_is_the_same_run(
    mlflow: Any, tmp_path: Path
) -> None:
    config = _config(tmp_path, "mlflow")
    with open_trackers(config) as trackers:
        assert trackers.show(_LINE) == []
        assert trackers.show({"phase": "model"}) == []
    with suppress(KeyboardInterrupt), open_trackers(config) as trackers:
        trackers.show(_LINE | {"step": 4, "loss": 1.5})
        raise KeyboardInterrupt
    experiment = mlflow.get_experiment_by_name("diptych")
    (run,) = mlflow.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "KILLED"
    assert run.data.params["optimizer.name"] == config.optimizer.name
    assert set(run.data.metrics) == {"epoch", "loss", "learning_rate"}
    history = mlflow.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(3, 2.5), (4, 1.5)]


_TRACKED = """
import sys
from cluster.trackers import open_trackers
from pipelines.config import DataConfig
from training.config import TrainConfig
config = TrainConfig(data=DataConfig(train="images"), output=sys.argv[1], trackers=("wandb",))
for step in (3, 4):
    with open_trackers(config) as trackers:
        assert trackers.show({"step": step, "loss": 2.5, "learning_rate": 0.1}) == []
"""


def test_wandb_writes_its_run_without_a_network(tmp_path: Path) -> None:
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    # In a process of its own, as a run is: what a client still has to write, it writes as that ends.
    command = [sys.executable, "-c", _TRACKED, str(tmp_path)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stderr) == (0, "")
    files = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1  # Named by the run's id.
    assert all(b"learning_rate" in file.read_bytes() for file in files)


def test_a_service_that_fails_at_the_end_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing:
        def log(self, step: int, metrics: object) -> None: ...

        def close(self, *, finished: bool) -> None:
            raise ConnectionError("gone")

    Trackers({"wandb": Refusing()}).close(finished=True)
    assert "wandb could not be told that this run ended: gone" in caplog.text


def test_a_service_that_does_not_take_the_run_is_named_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with (
        pytest.raises(ValueError, match="mlflow refuses this run"),
        open_trackers(_config(tmp_path, "mlflow")),
    ):
        pass


def test_a_service_that_fails_is_told_of_once_and_the_training_goes_on() -> None:
    class Refusing:
        closed = False

        def log(self, step: int, metrics: object) -> None:
            raise ConnectionError("gone")

        def close(self, *, finished: bool) -> None:
            self.closed = True

    refusing = Refusing()
    trackers = Trackers({"wandb": refusing})
    assert trackers.show(_LINE) == ["wandb gets no more metrics of this run: gone"]
    assert trackers.show(_LINE) == []
    trackers.close(finished=True)
    assert not refusing.closed


def test_a_client_that_is_not_installed_is_named_with_the_way_to_it() -> None:
    code = "import sys; sys.modules['wandb'] = None; from cluster.trackers import check_trackers; "
    said = subprocess.run(
        [sys.executable, "-c", code + "check_trackers(['wandb'])"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "trackers=wandb needs its client: pip install 'diptych[wandb]'" in said.stderr
    check_trackers(["wandb", "mlflow"])
