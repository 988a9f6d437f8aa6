"""Work in a process of its own that may crash."""

import os
import signal
import time
from pathlib import Path

import pytest

from pipelines.isolation import Crash, Isolated


def answer(number: int) -> int:
    if number < 0:
        os.kill(os.getpid(), -number)
    if number == 99:
        os._exit(3)
    if number == 100:
        raise ValueError("no such number")
    print("noise among the answers")
    return number * number


def process_of(_: int) -> int:
    return os.getpid()


@pytest.fixture
def isolated():
    work = Isolated(answer)
    yield work
    work.close()


def test_a_crash_costs_its_own_item_alone(isolated: Isolated) -> None:
    given = [1, -signal.SIGSEGV, 2, -signal.SIGABRT, 99, 3]
    assert list(isolated.each(given)) == [1, Crash(11), 4, Crash(6), Crash(None), 9]
    assert str(Crash(11)) == "decoding it ends the process (SIGSEGV)"


def test_what_the_work_raises_is_raised_and_the_next_item_is_answered(isolated: Isolated) -> None:
    with pytest.raises(ValueError, match="no such number"):
        list(isolated.each([100]))
    assert list(isolated.each([5])) == [25]


def test_one_process_answers_many_items_and_ends_when_it_is_closed() -> None:
    work = Isolated(process_of)
    (process,) = set(work.each(range(20)))
    assert isinstance(process, int)
    assert process != os.getpid()
    work.close()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
