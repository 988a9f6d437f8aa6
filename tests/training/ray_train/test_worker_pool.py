"""Workers that stay between tasks: what becomes of a task that nobody hears of any more."""

import time

import pyarrow as pa
import pytest

from pipelines.config import DataConfig
from pipelines.index import Index
from training.config import TrainConfig
from training.errors import StoppedError
from training.evaluation.evaluator import Sets
from training.metrics import Progress
from training.process import Worker
from training.ray_train.launch import Task, in_thread
from training.ray_train.worker_pool import WorkerPool


def _task(*, ends: bool) -> Task:
    """One that tells of its first step; sent by value: workers cannot import tests."""

    def task(config: TrainConfig, sets: Sets, worker: Worker, progress: Progress) -> None:
        progress({"step": 1})
        while not ends:
            if worker.stopping():
                raise StoppedError(1)
            time.sleep(0.05)

    return task


@pytest.mark.ray
@pytest.mark.slow
def test_after_an_exception_of_progress_the_next_task_gets_workers_and_close_returns(
    ray_cluster: None,
) -> None:
    def fail(event: dict[str, int]) -> None:
        raise KeyError(event["step"])

    config = TrainConfig(data=DataConfig(train=""), lanes=1, batch_size=2, workers=1, cpus_per_worker=1)
    sets, worker_pool, told = Sets(Index("", "folder", pa.table({}))), WorkerPool(), list[dict[str, int]]()

    def launch(progress: Progress, *, ends: bool) -> None:
        worker_pool.launch(config, sets, progress, _task(ends=ends), workers=1, stopping=lambda: False)

    with pytest.raises(KeyError):
        launch(fail, ends=False)
    in_thread(lambda: launch(told.append, ends=True)).result(120)
    assert {"step": 1} in told
    with pytest.raises(KeyError):
        launch(fail, ends=False)
    in_thread(worker_pool.close).result(120)
