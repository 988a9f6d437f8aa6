"""The searches that come with diptych."""

import re
import tomllib
from pathlib import Path

import pytest

import tuning.config
from tuning.config import SearchConfig

FOLDER = Path(tuning.config.__file__).parent / "searches"
SEARCHES = sorted(FOLDER.glob("*.toml"))


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_a_shipped_search_is_valid_and_opens_with_its_command_hardware_and_expectation(path: Path) -> None:
    text = path.read_text()
    values = tomllib.loads(text)
    values["train"]["data"]["train"] = "somewhere"
    SearchConfig(**values)
    opening = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    assert f"diptych tune {path.stem} " in opening
    assert re.search(r"cores|GPU", opening)
    assert re.search(r"\d %|unknown", opening)


def test_the_papers_searches_are_there() -> None:
    assert [path.stem for path in SEARCHES] == ["compound", "simclr"]
    space = tomllib.loads((FOLDER / "simclr.toml").read_text())["space"]
    assert set(space) == {"temperature", "batch_size", "optimizer.learning_rate"}
