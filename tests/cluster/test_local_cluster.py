"""diptych cluster: real Ray nodes on this machine, refused and ended; test_jobs.py has what they are like."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import diptych, started_cluster
from processes import cluster_processes
from strangers import stranger_reads

from cluster.cli.main import main
from cluster.local_cluster import visible_gpus

_NONE = "diptych: no cluster is running; start one with: diptych cluster up"


def test_an_address_that_is_none_of_this_machines_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        main(["cluster", "up", "--host", "192.0.2.254"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "diptych: host=192.0.2.254 is not this machine's address; leave it out, or give one\n"
    )


@pytest.mark.parametrize("visible", [None, "", "0"])
def test_its_head_has_the_gpus_that_cuda_sees(monkeypatch: pytest.MonkeyPatch, visible: str | None) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    count = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    assert visible_gpus() == int(subprocess.run(count, capture_output=True, text=True, check=True).stdout)


@pytest.mark.ray
def test_it_can_be_taken_down_after_a_crash_and_nothing_else_is(tmp_path: Path) -> None:
    with started_cluster(tmp_path, nodes=1) as cluster:
        mark = f"DIPTYCH_CLUSTER={cluster['mark']}"
        private = Path(cluster["folder"]).parent
        assert private.stat().st_mode & 0o777 == 0o700
        if os.getuid() == 0:
            assert stranger_reads(Path(cluster["folder"])) == "PermissionError"
        # It has a log of the cluster's open, as whoever looks at one has.
        (log, *_) = Path(cluster["folder"]).glob("session_latest/logs/*.log")
        waits = f"import time; log = open({str(log)!r}); time.sleep(600)"
        control = subprocess.Popen([sys.executable, "-c", waits])
        try:
            (holder,) = (
                process for process in cluster_processes(mark, cluster["folder"])
                if b"cluster.local_cluster import" in Path(f"/proc/{process}/cmdline").read_bytes()
            )  # fmt: skip
            os.kill(holder, signal.SIGKILL)
            down = diptych("cluster", "down")
            assert re.fullmatch(r"[1-9]\d* processes ended\n", down.stdout), down.stderr
            time.sleep(0.5)
            assert cluster_processes(mark, cluster["folder"]) == []
            assert not private.exists()
            assert control.poll() is None
        finally:
            control.kill()
            control.wait()
        gone = diptych("cluster", "status")
        assert gone.returncode == 1
        assert gone.stderr == f"{_NONE}\n"
        assert diptych("cluster", "down").stdout == "0 processes ended\n"
