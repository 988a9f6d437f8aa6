"""The phases of a start: nothing of the time since the process began is left out."""

import subprocess
import sys
import time

from cluster.terminal import Startup


def test_phases_add_up_to_the_whole() -> None:
    startup = Startup(time.monotonic() - 3.0)
    startup.reached("imports")
    startup.reached("first step")
    assert str(startup) == "first step after 3.0 s: imports 3.0, first step 0.0"


def test_a_command_counts_from_the_start_of_its_process() -> None:
    code = (
        "import time; time.sleep(1.0); from cluster.terminal import Startup; "
        "startup = Startup.of_the_command(); startup.reached('sleep'); print(startup)"
    )
    before = time.monotonic()
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    took = time.monotonic() - before
    seconds = float(said.partition("after ")[2].partition(" s")[0])
    assert 1.0 <= seconds <= took + 0.1
