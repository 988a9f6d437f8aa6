"""The pages in docs/: they build without a warning, and what they name exists."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from html import unescape
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.cli.jobs_commands import check_command
from cluster.cli.main import app
from pipelines.views import Views
from training.config import TrainConfig
from training.config.encoder import EncoderConfig
from training.gather import LocalGather
from training.models.encoders import build_encoder
from tuning.config import SearchConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
PACKAGES = ("pipelines", "training", "tuning", "cluster")

# Between the pieces of a message, what differs from case to case.
GAP = "\0"


def blocks(page: Path, language: str) -> Iterator[str]:
    """The page's blocks of code in that language, "" being what has none."""
    for found in re.finditer(r"^```(\S*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        if found[1] == language:
            yield found[2]


def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page, "") for line in block.replace("\\\n", " ").splitlines()]
    return [line.strip() for line in lines if line.strip().startswith("diptych ")]


def build(source: Path, dest: Path) -> subprocess.CompletedProcess[str]:
    """Sphinx's, with docs/conf.py; warnings and broken links are errors."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-c", DOCS]
    places = ["-d", dest / "trees", source, dest / "html"]
    return subprocess.run([*command, *places], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("site")
    done = build(DOCS, dest)
    assert done.returncode == 0, done.stderr
    return dest / "html"


def test_pages_build_without_a_warning_or_a_broken_link(site: Path) -> None:
    for page in PAGES:
        assert (site / f"{page.stem}.html").is_file()


def test_a_broken_link_fails(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# One\n\n[away](#nowhere) {key}`nothing`\n")
    done = build(tmp_path / "docs", tmp_path)
    assert done.returncode
    assert "nowhere" in done.stderr
    assert "nothing" in done.stderr


def test_the_reference_has_every_field_with_its_docstring(site: Path) -> None:
    for cls, name in ((TrainConfig, "config"), (SearchConfig, "search-config")):
        shown = " ".join(unescape(re.sub(r"<[^>]+>", "", (site / f"{name}.html").read_text())).split())
        for key, docstring in documented(cls):
            assert key in shown
            assert " ".join(docstring.replace("`", "").split()) in shown, key


def test_the_reference_has_every_command(site: Path) -> None:
    text = (site / "commands.html").read_text()
    for name in app:
        if not name.startswith("-"):
            below = [f"{name} {one}" for one in app[name] if not one.startswith("-")]
            assert all(f"diptych {command}" in re.sub(r"<[^>]+>", "", text) for command in below or [name])


def documented(cls: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and docstrings of a config class, with those of its parts, once where two share a class."""
    for name, known in cls.__pydantic_fields__.items():
        if hasattr(known.annotation, "__pydantic_fields__"):
            if known.annotation is not TrainConfig and name != "second_view":
                yield from documented(known.annotation, f"{prefix}{name}.")
        else:
            assert known.description, f"{prefix}{name} has no docstring"
            yield prefix + name, known.description


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_are_understood(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tomls = written_tomls(tmp_path)
    monkeypatch.chdir(tmp_path)
    for line in commands(page):
        tokens = shlex.split(line, comments=True)[1:]
        if "--resume" in tokens:  # Reads the run's config, and there is no run.
            continue
        for name in tomls & set(tokens):
            assert Path(name).is_file()
        command = app.parse_args(tokens, print_error=False, exit_on_error=False)[0]
        assert command is not app.default_command, line
        if tokens[0] == "submit":
            check_command(tuple(tokens[tokens.index("--") + 1 :]))


def written_tomls(folder: Path) -> set[str]:
    """The blocks that begin with a file's name, as that file; and what commands write."""
    names = set()
    for page in PAGES:
        for block in blocks(page, "toml"):
            if found := re.match(r"# (\S+\.toml)\n", block):
                (folder / found[1]).write_text(block)
                names.add(found[1])
    best = '[data]\ntrain = "images"\n'
    (folder / "best.toml").write_text(best)
    return names | {"best.toml"}


def test_settings_of_every_toml_block_are_valid() -> None:
    found = [(page, tomllib.loads(block)) for page in PAGES for block in blocks(page, "toml")]
    assert len(found) > 5
    for page, values in found:
        if "space" in values:
            SearchConfig(**values)
        else:
            values["data"] = {"train": "images"} | values.get("data", {})
            assert TrainConfig(**values), page


def test_python_blocks_import_what_exists() -> None:
    for page in PAGES:
        for block in blocks(page, "python"):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    assert node.module
                    assert all(hasattr(import_module(node.module), name.name) for name in node.names)


def test_the_block_about_losses_runs() -> None:
    (block,) = (block for block in blocks(DOCS / "python.md", "python") if "nt_xent" in block)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["first"].grad.shape == (256, 128)


def test_the_block_about_an_objective_is_one() -> None:
    (block,) = (block for block in blocks(DOCS / "python.md", "python") if "(Objective)" in block)
    names: dict[str, Any] = {}
    exec(block, names)
    encoder = build_encoder(EncoderConfig(name="resnet8"))
    objective = names["Agreement"](encoder, gather=LocalGather(), spread=0.5)
    images = tuple(torch.randn(2, 4, 3, 32, 32))
    loss = objective(Views(images, torch.full((4,), -1), np.arange(4)))
    loss.backward()
    assert all(weight.grad is not None for weight in encoder.parameters())


def test_files_that_pages_name_exist() -> None:
    folders = "|".join((*PACKAGES, "tests", "benchmarks", "docs"))
    for page in PAGES:
        for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_every_promise_has_a_test() -> None:
    named = re.findall(r"`(tests/[\w./]+)::(\w+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 20
    missing = [f"{path}::{test}" for path, test in named if f"\ndef {test}(" not in (ROOT / path).read_text()]
    assert not missing


def test_errors_of_the_page_are_those_of_the_code() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    terms = re.findall(r"^`(.+)`$\n: ", page, re.MULTILINE)
    assert len(terms) > 80
    unknown = [
        term for term in terms if not any(contains(template, pieces_of(term)) for template in templates())
    ]
    assert not unknown


def pieces_of(term: str) -> list[str]:
    return [piece for piece in term.split("…") if piece.strip()]


def contains(template: str, pieces: list[str]) -> bool:
    """Whether the pieces stand in it one after the other, with what differs between them."""
    there = all(piece in template for piece in pieces)
    return there and re.search(f"{GAP}.*?".join(map(re.escape, pieces)), template) is not None


@cache
def templates() -> list[str]:
    """Every text of the code, formatted values being GAP."""
    found = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.sub("%s|%.0f", GAP, node.value))  # As logging has it.
    return found
