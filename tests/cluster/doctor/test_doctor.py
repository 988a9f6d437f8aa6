"""diptych doctor on a cluster that cannot train; test_jobs.py has one that can."""

import pytest
import ray
from commands import diptych

from cluster.cli.main import main
from cluster.doctor.node_checks import exact_results, object_store_result, version_results


@pytest.mark.ray
def test_a_missing_storage_and_missing_workers_are_errors(
    ray_cluster: None, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--storage", "s3://no-such-bucket-of-ours/x", "--workers", "400"])
    assert stopped.value.code == 1
    shown = capsys.readouterr().out
    errors = [line for line in shown.splitlines() if line.startswith("error")]
    assert len(errors) == 2
    assert "no-such-bucket-of-ours" in errors[0]
    assert "-> give the node credentials that may write there" in shown
    cpus = ray.cluster_resources()["CPU"]
    fits = max(count for count in (1, 2, 4, 5, 8) if 2 * count <= cpus)  # Those that divide 400.
    assert f"workers=400 need 800 CPUs of the cluster, which has {cpus:g}; try --workers {fits}" in errors[1]


def test_nodes_with_other_versions_are_an_error() -> None:
    about = {"Python": "3.11.7", "Ray": "2.60.0"}
    answers = {"a": {"versions": about}, "b": {"versions": about | {"Ray": "2.61.0"}}}
    same, differs = version_results(answers)
    assert (same.level, same.found) == ("ok", "Python 3.11.7")
    assert (differs.level, differs.found) == ("error", "2.60.0 on a; 2.61.0 on b")
    assert differs.way_out == "give all nodes the same image"


def test_nodes_with_other_bits_are_a_warning_that_says_what_differs() -> None:
    one, other = {"CPU": "EPYC", "torch": "2.11"}, {"CPU": "Xeon", "torch": "2.11"}
    (same,) = exact_results("CPU", {"a": ("01", one), "b": ("01", other)})
    assert (same.level, same.found) == ("ok", "the same bits, 01")
    (differs,) = exact_results("CPU", {"a": ("01", one), "b": ("02", other), "c": ("01", one)})
    assert (differs.level, differs.where) == ("warning", "b")
    assert differs.found == "other bits than on a: CPU EPYC and Xeon"


@pytest.mark.parametrize(
    ("store", "shared", "level", "way_out"),
    [
        (512, 1024, "ok", ""),
        (512, 64, "warning", "more shared memory"),
        (100, 1024, "warning", "--object-store-memory"),
    ],
)
def test_an_object_store_on_disk_or_too_small_is_a_warning(
    store: int, shared: int, level: str, way_out: str
) -> None:
    found = object_store_result("a", store * 2**20, shared * 2**20)
    assert found.level == level
    assert way_out in found.way_out


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1; check RAY_ADDRESS, or unset it"),
        ("http://127.0.0.1:1", "http://127.0.0.1:1 takes only jobs; submit one: diptych submit --address"),
    ],
)
def test_a_cluster_that_does_not_answer_is_one_line(address: str, message: str) -> None:
    ended = diptych("doctor", "--address", address)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(f"diptych: {message}")
