"""Arrows point one way, and frameworks stay at the edge."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipelines", "training", "tuning", "cluster")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Where each framework may be imported; a name below a package stands for the whole of it.
HOMES = {
    "ray": {
        "training/gauges.py",
        "pipelines/read_ahead.py",
        "pipelines/stream.py",
        "training/worker.py",
        "training/process_group.py",
        "training/capacity.py",
        "training/turns.py",
        "training/channel.py",
        "training/nodes.py",
        "training/crew.py",
        "tuning/search.py",
        "tuning/strategies.py",
        "tuning/asha.py",
        "tuning/combinations.py",
        "cluster/local.py",
        "cluster/embedded.py",
        "cluster/jobs.py",
        "cluster/node_checks.py",
        "cluster/nodes.py",
        "cluster/worker_check.py",
    },
    "nvidia": {"pipelines/graph.py"},
    "cyclopts": {
        "cluster/app.py",
        "cluster/cli.py",
        "cluster/cluster_cli.py",
        "cluster/data_cli.py",
        "cluster/jobs_cli.py",
        "cluster/tune_cli.py",
        "cluster/config_file.py",
    },
}


def imports(path: Path) -> set[str]:
    """The dotted names that a file imports, wherever in it they stand."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            # A name may be that of a module.
            found |= {f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("framework", HOMES)
def test_framework_is_imported_where_the_design_says_and_nowhere_else(framework: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in MODULES
        if any(name.split(".")[0] == framework for name in imports(path))
    }
    assert users == {home for home in HOMES[framework] if (ROOT / home).exists()}


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_only_packages_to_its_left(package: str) -> None:
    allowed = PACKAGES[: PACKAGES.index(package) + 1]
    for path in (ROOT / package).rglob("*.py"):
        used = {name.split(".")[0] for name in imports(path)} & set(PACKAGES)
        assert used <= set(allowed), f"{path} imports {used - set(allowed)}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {_dotted(path): path for path in MODULES}
    # Not to packages: those export modules lazily, for users.
    graph = {
        name: {found for found in imports(path) & modules.keys() if modules[found].stem != "__init__"}
        for name, path in modules.items()
    }
    TopologicalSorter(graph).prepare()


def _dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_module_says_its_purpose_in_its_first_line() -> None:
    silent = [
        path for path in MODULES if path.read_text() and not (ast.get_docstring(ast.parse(path.read_text())))
    ]
    assert silent == []
