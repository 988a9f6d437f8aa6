"""DALI's conversion of the graph's code."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from nvidia.dali import fn, pipeline_def


@pipeline_def(enable_conditionals=True)
def _beyond_conversion() -> Any:
    for _ in range(1):
        pass
    else:
        pass
    return fn.random.coin_flip()


def test_a_graph_that_dali_cannot_convert_is_an_error():
    # DALI would log it once and continue with code whose conditions see no samples.
    with pytest.raises(AssertionError, match="could not transform"):
        _beyond_conversion(batch_size=1, num_threads=1, device_id=None)


_BUILD = """
import os, signal, sys
from pipelines.augment.dali_graph import build_crops, build_decoder
from pipelines.config import ViewRecipe
rotated = ViewRecipe(size=32, rotate=0.5)
build_crops((rotated,), lambda: [], batch_size=1, threads=1, gpu=None, prefetch=1)
build_decoder(gpu=None)
print(sum(name.startswith("__autograph_generated_file") for name in sys.modules), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_files_of_the_converted_code_do_not_outlive_a_process_that_is_killed(tmp_path: Path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    killed = subprocess.run(
        [sys.executable, "-c", _BUILD], env=environment, capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert int(killed.stdout) > 0  # DALI has made modules from files.
    assert list(tmp_path.iterdir()) == []
