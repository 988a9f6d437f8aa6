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
        "pipelines/stream.py",
        "training/ray_train/channel.py",
        "training/ray_train/failures.py",
        "training/ray_train/launch.py",
        "training/ray_train/nodes.py",
        "training/ray_train/process_group.py",
        "training/ray_train/turns.py",
        "training/ray_train/worker.py",
        "training/ray_train/worker_pool.py",
        "tuning/asha.py",
        "tuning/search.py",
        "tuning/searcher.py",
        "cluster/doctor/node_checks.py",
        "cluster/doctor/worker_checks.py",
        "cluster/jobs.py",
        "cluster/local_cluster.py",
        "cluster/ray_cluster.py",
        "cluster/tables.py",
    },
    "nvidia": {"pipelines/augment/dali_graph.py"},
    "cyclopts": {
        "cluster/cli/app.py",
        "cluster/cli/cluster_commands.py",
        "cluster/cli/data_commands.py",
        "cluster/cli/help.py",
        "cluster/cli/jobs_commands.py",
        "cluster/cli/main.py",
        "cluster/cli/tune_commands.py",
        "cluster/config_file.py",
    },
    "timm": {"training/models/timm_models.py"},
    "plotly": {"training/report/curves.py", "training/report/page.py", "tuning/figures.py"},
    "jinja2": {"training/report/page.py"},
}

# Who may use what others keep private, and why: behind a function that does without, with a test of that.
PRIVATE = {
    "pipelines/stream.py": "Ray Data offers no limit of how many tables it is ahead by",
    "training/ray_train/nodes.py": "Ray's public calls tell neither drained nodes nor what each has to spare",
    "cluster/ray_cluster.py": "Ray's own RAY_ADDRESS=auto takes other processes' private clusters too",
    "cluster/jobs.py": "Ray's client of jobs waits for answers without a limit",
}

# Underscored names that Python's documentation has.
DOCUMENTED = {"_asdict", "_exit", "_fields", "_make", "_replace"}


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


def test_private_names_are_used_where_there_is_a_reason_and_nowhere_else() -> None:
    users = {str(path.relative_to(ROOT)) for path in MODULES if private_names(path)}
    assert users == {name for name in PRIVATE if (ROOT / name).exists()}


def private_names(path: Path) -> set[str]:
    """What a file uses of others that begins with one underscore: imports, attributes, arguments by name."""
    parts = {part for name in imports(path) for part in name.split(".")}
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                parts.add(name)
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr"), args=[_, ast.Constant(value=name), *_]
            ):
                parts.add(name)
    private = {part for part in parts if part.startswith("_") and not part.startswith("__")}
    return private - DOCUMENTED


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
