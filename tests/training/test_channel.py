"""Between workers and driver: what happens to the driver's end when the channel itself is gone."""

import threading

import pytest
import ray

from training.channel import open_channel


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
