"""diptych doctor on a real cluster: what it says of one that can train, and of one that cannot."""

import pytest
from commands import diptych

from cluster.cli import main
from cluster.node_checks import object_store_finding, version_findings
from pipelines import storage

pytestmark = pytest.mark.ray


def _doctor(*flags: str) -> int:
    try:
        main(["doctor", *flags])
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 1
    return 0


def test_a_cluster_that_can_train_passes_every_check(
    ray_cluster: None, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _doctor("--storage", f"{bucket}/doctor", "--workers", "2") == 0
    shown = capsys.readouterr().out
    assert shown.endswith("this cluster can train\n")
    levels = {line.split()[0] for line in shown.splitlines()[2:-1] if line.strip() and line[0] != " "}
    assert levels == {"ok"}
    for check in ("versions", "CPUs, GPUs", "memory", "object store", "DALI on the CPU", "clock", "storage"):
        assert check in shown
    for told in ("2 on 1 node(s), gloo", "views within 0e+00", "GB/s into each worker", "MB/s, read"):
        assert told in shown
    assert storage.names(f"{bucket}/doctor") == []


def test_a_storage_and_workers_that_are_not_there_are_faults(
    ray_cluster: None, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _doctor("--storage", "s3://no-such-bucket-of-ours/x", "--workers", "400") == 1
    shown = capsys.readouterr().out
    faults = [line for line in shown.splitlines() if line.startswith("fault")]
    assert len(faults) == 2
    assert "no-such-bucket-of-ours" in faults[0]
    assert "-> let the node's own credentials write there" in shown
    assert "workers=400 need 800 CPUs of the cluster, which has 9; try --workers 4" in faults[1]


def test_nodes_with_other_versions_are_a_fault() -> None:
    about = {"Python": "3.11.7", "Ray": "2.60.0"}
    answers = {"a": {"versions": about}, "b": {"versions": about | {"Ray": "2.61.0"}}}
    same, differs = version_findings(answers)
    assert (same.level, same.found) == ("ok", "Python 3.11.7")
    assert (differs.level, differs.found) == ("fault", "2.60.0 on a; 2.61.0 on b")
    assert differs.way_out == "give all nodes the same image"


@pytest.mark.parametrize(
    ("store", "shared", "level", "way_out"),
    [
        (512, 1024, "ok", ""),
        (512, 64, "told", "more shared memory"),
        (100, 1024, "told", "--object-store-memory"),
    ],
)
def test_an_object_store_on_disk_or_too_small_is_told_of(
    store: int, shared: int, level: str, way_out: str
) -> None:
    found = object_store_finding("a", store * 2**20, shared * 2**20)
    assert found.level == level
    assert way_out in found.way_out


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1; see RAY_ADDRESS, or leave it out"),
        ("http://127.0.0.1:1", "http://127.0.0.1:1 takes jobs alone; submit it: diptych submit --address"),
    ],
)
def test_a_cluster_that_does_not_answer_is_one_line(address: str, message: str) -> None:
    ended = diptych("doctor", "--address", address)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(f"diptych: {message}")
