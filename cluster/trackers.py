"""Experiment trackers: send a run's metrics to MLflow and Weights & Biases through their own clients."""

import hashlib
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from typing import Any, Protocol

from training.config import TrackerName, TrainConfig, config_hash
from training.trainer import run_uri

_log = logging.getLogger(__name__)

_NOT_METRICS = ("step", "steps")


class Tracker(Protocol):
    """An experiment tracker."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, *, finished: bool) -> None: ...


class Trackers:
    """Log a run's metrics to all trackers. A tracker that fails is reported once and then dropped."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    def show(self, values: Mapping[str, Any]) -> list[str]:
        """Log the finite numbers in `values`; returns a message for each tracker that failed."""
        metrics = {key: float(value) for key, value in values.items() if _is_metric(key, value)}
        failed: list[str] = []
        for name, tracker in list(self._trackers.items()) if metrics else ():
            try:
                tracker.log(values["step"], metrics)
            except Exception as error:  # Training continues whatever a tracker raises.
                del self._trackers[name]
                failed.append(f"{name} gets no more metrics of this run: {error}")
        return failed

    def close(self, *, finished: bool) -> None:
        for name, tracker in self._trackers.items():
            try:
                tracker.close(finished=finished)
            except Exception as error:  # The run has ended; its own metrics are complete.
                _log.warning("%s could not be told that this run ended: %s", name, error)


@contextmanager
def open_trackers(config: TrainConfig) -> Iterator[Trackers]:
    """Open the config's trackers until the block ends. Raises ValueError if one refuses the run."""
    trackers = Trackers({name: _open(name, config) for name in config.trackers})
    finished = False
    try:
        yield trackers
        finished = True
    finally:
        trackers.close(finished=finished)


def check_trackers(names: Iterable[TrackerName]) -> None:
    """Raises ValueError if a tracker's client is not installed."""
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise ValueError(
                f"trackers={name} needs its client: pip install 'diptych[{name}]' ({error})"
            ) from None


def _open(name: TrackerName, config: TrainConfig) -> Tracker:
    try:
        return _Mlflow(config) if name == "mlflow" else _Wandb(config)
    except Exception as error:
        raise ValueError(f"{name} refuses this run: {' '.join(str(error).split())}") from error


class _Mlflow:
    """MLflow. MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and credentials come from the environment."""

    _TAG = "diptych.run"

    def __init__(self, config: TrainConfig) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric
        from mlflow.environment_variables import MLFLOW_EXPERIMENT_NAME

        self._metric, self._client = Metric, MlflowClient()
        name = MLFLOW_EXPERIMENT_NAME.get() or "diptych"
        experiment = self._client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment else self._client.create_experiment(name)
        identity = _identity(config)
        # A resumed run is the same run in MLflow.
        same = self._client.search_runs([where], f"tags.`{self._TAG}` = '{identity}'", max_results=1)
        if same:
            self._run = same[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        self._run = self._client.create_run(
            where, run_name=config.name, tags={self._TAG: identity}
        ).info.run_id
        for key, value in _flat(asdict(config)):
            self._client.log_param(self._run, key, value)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = round(1000 * time.time())
        self._client.log_batch(
            self._run, [self._metric(key, value, now, step) for key, value in metrics.items()]
        )

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")


class _Wandb:
    """Weights & Biases. WANDB_PROJECT, WANDB_MODE and WANDB_API_KEY come from the environment."""

    def __init__(self, config: TrainConfig) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "diptych"), name=config.name, config=asdict(config),
            # A resumed run is the same run there.
            id=hashlib.sha256(_identity(config).encode()).hexdigest()[:16], resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


def _identity(config: TrainConfig) -> str:
    return f"{config_hash(config)} {run_uri(config)}"


def _is_metric(key: str, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and key not in _NOT_METRICS and math.isfinite(value)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
