"""Work that may crash runs in a separate process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.images.isolation import Crash, Isolated


def answer(number: int) -> int:
    if number < 0:
        os.kill(os.getpid(), -number)
    if number == 99:
        os._exit(3)
    if number == 100:
        raise ValueError("no such number")
    if number == 50:  # Press Ctrl-C for whoever waits for the answer.
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(2)
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


# SIGINT may be ignored by the process that runs the tests.
_INTERRUPT = """
import signal
from pipelines.images.isolation import Isolated
from test_isolation import answer
signal.signal(signal.SIGINT, signal.default_int_handler)
work = Isolated(answer)
try:
    list(work.each([50]))
    raise SystemExit("was not interrupted")
except KeyboardInterrupt:
    assert list(work.each([3, 4])) == [9, 16]
work.close()
"""


def test_after_an_interrupt_an_item_gets_its_own_answer() -> None:
    path = os.pathsep.join([str(Path(__file__).parents[3]), str(Path(__file__).parent)])
    subprocess.run(
        [sys.executable, "-c", _INTERRUPT], env=os.environ | {"PYTHONPATH": path}, check=True, timeout=60
    )


_FORK = """
import os
from pipelines.images.isolation import Isolated
work = Isolated(abs)
assert list(work.each([-1])) == [1]
child = os.fork()
right = list(work.each(range(-300, 0))) == list(range(300, 0, -1))
if not child:
    os._exit(0 if right else 1)
assert right and os.waitpid(child, 0)[1] == 0
work.close()
"""


def test_a_process_that_is_forked_off_has_one_of_its_own() -> None:
    subprocess.run(
        [sys.executable, "-c", _FORK], env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        check=True, timeout=60,
    )  # fmt: skip


def test_it_starts_where_the_folder_at_hand_is_gone_and_modules_print(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    (tmp_path / "sitecustomize.py").write_text("print('noise of a module that Python imports by itself')")
    code = (
        "import os; os.rmdir(os.getcwd()); from pipelines.images.isolation import Isolated as I; w = I(abs); "
    )
    code += "assert list(w.each([-3])) == [3]; w.close()"
    path = os.pathsep.join([str(Path(__file__).parents[3]), str(tmp_path)])
    subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path / "gone",
        check=True, timeout=60,
    )  # fmt: skip


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
