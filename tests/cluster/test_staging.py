"""What goes along with a job: no more than its cluster lacks, and never a secret."""

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from cluster import installed
from cluster.staging import read_probe, requirements, stage

_HERE = {
    "python": "3.11.7",
    "ray": metadata.version("ray"),
    "fingerprint": installed.fingerprint(),
    "unmet": [],
}


def _there(**differences: Any) -> dict[str, Any]:
    return _HERE | differences


def test_where_the_cluster_has_the_same_diptych_only_the_config_goes_along(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text("epochs = 3\n")
    job = stage(["train", str(config), "--name", "a b"], _there())
    assert job.files == {"mine.toml": b"epochs = 3\n"}
    assert job.install == ()
    assert job.entrypoint == "exec python -m cluster train mine.toml --name 'a b'"
    assert job.why == "the cluster has this diptych: nothing is installed"


@pytest.mark.parametrize("fingerprint", [None, "0" * 64])
def test_where_it_has_not_the_code_goes_along_and_nothing_else(fingerprint: str | None) -> None:
    job = stage(["train", "--data.train", "s3://a/b"], _there(fingerprint=fingerprint))
    root = Path(__file__).parents[2]
    code = {
        str(path.relative_to(root))
        for package in ("pipelines", "training", "tuning", "cluster")
        for path in (root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    record = f"diptych-{metadata.version('diptych')}.dist-info/METADATA"
    assert job.files.keys() == code | {record}
    assert job.size < 2 * 2**20
    assert job.install == ()


def test_the_code_that_goes_along_is_all_that_a_bare_python_needs_to_find_diptych(tmp_path: Path) -> None:
    stage(["doctor"], _there(fingerprint=None)).write(tmp_path)
    (found,) = metadata.distributions(path=[str(tmp_path)])
    assert (found.name, found.version) == ("diptych", metadata.version("diptych"))


def test_what_is_missing_there_is_installed_as_it_is_here() -> None:
    job = stage(["doctor"], _there(fingerprint=None, unmet=["cyclopts>=5.4", "no-such-package>=3"]))
    assert job.install == (f"cyclopts=={metadata.version('cyclopts')}", "no-such-package>=3")
    assert "pip adds what is missing there" in job.why


def test_a_command_s_trackers_and_formats_are_needed_too(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text('trackers = ["mlflow"]\n')
    usual = set(requirements(["train", "demo"]))
    assert not any(line.startswith(("mlflow", "wandb", "onnx")) and ";" not in line for line in usual)
    for command, extra in (
        (["train", str(config)], "mlflow-skinny>=3"),
        (["train", "demo", "--trackers", "wandb"], "wandb>=0.22"),
        (["train", "demo", "--trackers=wandb"], "wandb>=0.22"),
        (["export", "RUN", "out", "--format", "onnx"], "onnxscript>=0.5"),
        (["export", "RUN", "out.onnx"], "onnxscript>=0.5"),
    ):
        assert extra in requirements(command)


def test_no_variable_of_this_process_is_in_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "planted-secret")
    job = stage(["doctor"], _there(fingerprint=None, unmet=["cyclopts>=5.4"]))
    assert "planted-secret" not in repr((job, job.environment(tmp_path)))


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"python": "3.9.2"}, "the cluster has Python 3.9.2; diptych needs <3.14,>=3.11"),
        ({"ray": "2.40.0", "unmet": ["ray[data]>=2.60"]}, "the cluster has Ray 2.40.0; diptych needs ray"),
    ],
)
def test_what_a_job_cannot_change_is_refused(there: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        stage(["doctor"], _there(**there))


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.toml").write_text("")
    with pytest.raises(ValueError, match=r"two files in the command are named x\.toml; rename one"):
        stage(["train", f"{tmp_path}/a/x.toml", f"{tmp_path}/b/x.toml"], _there())


def test_a_probe_finds_what_is_missing_and_what_extras_want() -> None:
    wanted = [
        "numpy>=1",
        "numpy>=999",
        "no-such-package>=3",
        "no-such-package-on-mars; sys_platform == 'mars'",
        "ray[data]>=2",
    ]
    assert list(installed.unmet(wanted)) == ["numpy>=999", "no-such-package>=3"]


def test_a_probe_that_failed_says_why() -> None:
    with pytest.raises(ValueError, match="the probe of the cluster failed: python: not found"):
        read_probe("Running entrypoint\npython: not found\n")
    assert read_probe('noise\n{"python": "3.11.7"}\n') == {"python": "3.11.7"}
