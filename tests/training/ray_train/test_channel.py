"""Between workers and driver: what happens to the driver's end when the channel itself is gone."""

import threading
import time

import pytest
import ray

from training.ray_train.channel import open_channel


@pytest.mark.ray
def test_the_driver_s_threads_end_without_a_word_when_the_channel_does(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list[threading.ExceptHookArgs]()
    monkeypatch.setattr(threading, "excepthook", said.append)
    before = set(threading.enumerate())
    with open_channel(lambda event: None, lambda: False) as worker_end:
        threads = set(threading.enumerate()) - before
        assert len(threads) >= 2
        ray.kill(worker_end._actor)
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert said == []


@pytest.mark.ray
def test_what_progress_raises_stops_the_workers_and_ends_the_block(ray_cluster: None) -> None:
    def progress(event: dict[str, int]) -> None:
        raise KeyError(event["step"])

    def work() -> None:
        with open_channel(progress, lambda: False) as worker_end:
            worker_end.put({"step": 1})
            worker_end.put({"step": 2})
            deadline = time.monotonic() + 60
            while not ray.get(worker_end._actor.stopping.remote()):
                assert time.monotonic() < deadline
                time.sleep(0.05)

    with pytest.raises(KeyError, match="1"):
        work()
