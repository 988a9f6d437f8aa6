"""Whose turn it is on a real cluster whose room others hold."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import pytest
from ray.util.placement_group import placement_group, remove_placement_group

from pipelines.config import DataConfig
from training.config import TrainConfig
from training.errors import StoppedError
from training.ray_train.nodes import can_grow, free_resources
from training.ray_train.turns import Place, groups_of, others_wait, remove_groups

pytestmark = pytest.mark.ray


def _free() -> float:
    return sum(node.get("CPU", 0.0) for node in free_resources())


def _until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def each(ray_cluster: None) -> float:
    """CPUs for a worker of which two fit into what the cluster has to spare, and no third."""
    return round(_free() / 2.5, 2)


def _config(each: float, workers: int | str) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(train=""), lanes=2, batch_size=4, workers=workers, cpus_per_worker=each
    )


@contextmanager
def _taken(cpus: float, *, left: float) -> Iterator[Callable[[], None]]:
    """Another run has so many CPUs, and leaves so many, until what this gives is called or the block ends."""
    group = placement_group([{"CPU": cpus}])
    assert group.wait(60)
    _until(lambda: abs(_free() - left) < 0.1)  # Readers of the pool's workers may have a hundredth each.
    try:
        yield lambda: remove_placement_group(group)
    finally:
        remove_placement_group(group)
        _until(lambda: abs(_free() - left - cpus) < 0.1)


class _Waiting:
    """A run that waits for its turn in a thread."""

    def __init__(self, config: TrainConfig, since: float) -> None:
        self.said, self.stop, self.workers = list[str](), Event(), 0
        self.left = Event()
        self._thread = Thread(target=self._wait, args=(config, since), daemon=True)
        self._thread.start()

    def _wait(self, config: TrainConfig, since: float) -> None:
        with Place(since) as place:
            hear = lambda event: self.said.append(event["waiting"])  # noqa: E731
            try:
                self.workers, _ = place.wait(config, 2, hear, self.stop.is_set)
            except StoppedError:
                self.workers = -1
            self.left.wait()

    def end(self) -> None:
        self.stop.set()
        self.left.set()
        self._thread.join()


def test_runs_wait_for_room_in_the_order_in_which_they_came(each: float) -> None:
    config = _config(each, 2)
    with _taken(2 * each, left=0.5 * each) as give_back:
        second = _Waiting(config, since=2.0)
        _until(lambda: second.said)
        assert second.said[0].startswith(f"{2 * each:g} CPUs; ")
        assert "are in use by " in second.said[0]
        assert "before it" not in second.said[0]
        first = _Waiting(config, since=1.0)
        _until(lambda: second.said[-1].endswith("; 1 other waits before it"))
        assert others_wait()
        give_back()
        _until(lambda: first.workers)
        assert (first.workers, second.workers) == (2, 0)
        first.end()
        _until(lambda: second.workers)
        assert second.workers == 2
        second.end()
    assert not others_wait()


def test_whoever_is_told_to_stop_leaves_the_line(each: float) -> None:
    with _taken(2 * each, left=0.5 * each):
        waiting = _Waiting(_config(each, 2), since=1.0)
        _until(lambda: waiting.said)
        waiting.end()
        assert waiting.workers == -1
        assert not others_wait()


def test_a_run_that_may_have_fewer_workers_begins_with_those_that_fit_and_can_grow(each: float) -> None:
    config = _config(each, "1:2")
    with _taken(each, left=1.5 * each):
        waiting = _Waiting(config, since=1.0)
        _until(lambda: waiting.workers)
        assert waiting.workers == 1
        waiting.end()
        with _taken(each, left=0.5 * each):
            assert not can_grow(config, 1)
        assert can_grow(config, 1)
        assert not can_grow(config, 2)


def test_a_group_that_something_else_has_left_is_found_and_removed(ray_cluster: None) -> None:
    bundle = {"CPU": 0.125}
    left = placement_group([bundle] * 3)
    assert left.wait(60)
    (found,) = groups_of(bundle, 3)
    assert groups_of(bundle, 2) == set()
    remove_groups([found])
    _until(lambda: groups_of(bundle, 3) == set())


_WAITING = """
import sys
import ray
from pipelines.config import DataConfig
from ray.util.placement_group import placement_group
from training.config import TrainConfig
from training.errors import NoRoomError
from training.ray_train.turns import Place
ray.init(sys.argv[1], log_to_driver=False)
assert placement_group([{"CPU": 2}]).wait(60)  # Another run's.
for workers, most in (("2", 2), ("1:3", 1)):
    config = TrainConfig(data=DataConfig(train=""), lanes=6, batch_size=6, workers=workers, cpus_per_worker=2)
    try:
        with Place(1.0) as place:
            tell = lambda event: print(event["waiting"], flush=True)
            print("room for", place.wait(config, most, tell, lambda: False)[0], flush=True)
    except NoRoomError as error:
        print("too small:", error, flush=True)
"""


@pytest.mark.slow
def test_whoever_waits_notices_that_nodes_have_gone_and_that_others_have_come() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        node = cluster.add_node(num_cpus=2)
        command = [sys.executable, "-c", _WAITING, cluster.address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            said = process.stdout.readline
            assert said() == "4 CPUs; 2 of the cluster's 4 are in use by 1 other run\n"
            cluster.remove_node(node)
            assert said() == (
                "too small: workers=2 need 4 CPUs of the cluster, which has 2; try --workers 1\n"
            )
            assert said() == "2 CPUs; 2 of the cluster's 2 are in use by 1 other run\n"
            cluster.add_node(num_cpus=6)
            # At least one: a run takes more workers once Ray tells of the room for them.
            assert said() in [f"room for {workers}\n" for workers in (1, 2, 3)]
            assert process.wait(60) == 0
    finally:
        cluster.shutdown()
