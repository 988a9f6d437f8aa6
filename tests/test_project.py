"""The project's files agree on versions, and package indexes take its metadata."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from trove_classifiers import classifiers

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()
LOCKED = re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==(\S+)", LOCK, re.MULTILINE)


def test_changelog_and_citation_have_the_projects_version() -> None:
    newest = re.search(r"^## \[([\d.]+)\] - ([\d-]+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == newest[1] == citation["version"]
    assert str(citation["date-released"]) == newest[2]
    assert citation["license"] == PROJECT["license"]


@pytest.mark.parametrize("line", PROJECT["dependencies"])
def test_locked_versions_are_ones_that_the_project_takes(line: str) -> None:
    wanted = Requirement(line)
    versions = [version for name, version in LOCKED if name.lower() == wanted.name.lower()]
    assert versions
    assert all(wanted.specifier.contains(version) for version in versions)


def test_ruff_before_a_commit_is_the_locked_one() -> None:
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [f"v{version}" for name, version in LOCKED if name == "ruff"] == [hooks["rev"]]


def test_ci_runs_what_must_pass() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert ".ci/run" in [step.get("run") for job in jobs.values() for step in job["steps"]]


def test_classifiers_are_known_and_name_the_pythons_that_the_project_takes() -> None:
    assert set(PROJECT["classifiers"]) <= classifiers
    pythons = SpecifierSet(PROJECT["requires-python"])
    taken = {f"Programming Language :: Python :: 3.{minor}" for minor in range(30) if f"3.{minor}" in pythons}
    assert taken == {name for name in PROJECT["classifiers"] if "Python :: 3." in name}
