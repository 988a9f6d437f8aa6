"""An objective of the user's own: found, checked against its options, and the file that workers need."""

import sys
from pathlib import Path

import pytest

from cluster.staging import stage
from pipelines.config import DataConfig
from pipelines.index import Index, build_index
from training.config import TrainConfig
from training.gather import LocalGather
from training.objective_builder import build_objective
from training.own_objective import find_own, own_modules

_CODE = """
import torch
from training import Objective

class Mine(Objective):
    def __init__(self, encoder, *, gather, scale: float = 1.0, power: int = 2):
        super().__init__(encoder)
        self.scale, self.power = scale, power

class Other:
    pass
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder at hand, with a module and a package of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.startswith("mine_")]:  # Those of the test before.
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "mine_alone.py").write_text(_CODE)
    (tmp_path / "mine_package" / "deep").mkdir(parents=True)
    for name in ("__init__.py", "deep/__init__.py"):
        (tmp_path / "mine_package" / name).write_text("")
    (tmp_path / "mine_package" / "deep" / "loss.py").write_text(_CODE)
    (tmp_path / "mine_package" / "notes.txt").write_text("no code")
    return tmp_path


def _config(**values: object) -> TrainConfig:
    return TrainConfig(data=DataConfig(train="images"), **values)  # pyright: ignore[reportArgumentType]


def test_it_is_built_with_the_options_of_the_config(home: Path, images_index: Index) -> None:
    own_modules("mine_alone:Mine")
    config = _config(objective="mine_alone:Mine", objective_options={"scale": 0.5, "power": "3"})
    objective = build_objective(config, images_index, LocalGather())
    assert (objective.scale, objective.power) == (0.5, 3)
    assert objective.encoder.dim == 2048


@pytest.fixture
def images_index(home: Path) -> Index:
    from folders import digit_folders

    return build_index(str(digit_folders(home / "images", 10)), DataConfig(train="images"))


def test_workers_need_its_file_or_its_whole_package(home: Path) -> None:
    assert own_modules("mine_alone:Mine", {}) == [home / "mine_alone.py"]
    assert own_modules("mine_package.deep.loss:Mine", {}) == [home / "mine_package"]
    assert own_modules("torch.nn:Linear") == []  # Installed: theirs too.
    assert own_modules("simclr", {}) == []


def test_its_code_goes_along_with_a_job(home: Path) -> None:
    from cluster import installed

    there = {"python": "3.12.1", "ray": "2.60.0", "fingerprint": installed.fingerprint(), "unmet": []}
    assert stage(["train", "--objective", "mine_alone:Mine"], there).files == {
        "mine_alone.py": _CODE.encode()
    }
    (home / "run.toml").write_text('objective = "mine_package.deep.loss:Mine"\n')
    (home / "search.toml").write_text('[train]\nobjective = "mine_alone:Mine"\n')
    packaged = {f"mine_package/{name}" for name in ("__init__.py", "deep/__init__.py", "deep/loss.py")}
    assert stage(["train", "run.toml"], there).files.keys() == {"run.toml"} | packaged
    assert stage(["tune", "search.toml"], there).files.keys() == {"search.toml", "mine_alone.py"}


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("mine_alone:Nothing", {}, "mine_alone:Nothing is no class; define class Nothing"),
        ("mine_alone:Other", {}, "mine_alone:Other is no class"),
        ("mine_nowhere:Mine", {}, "No module named 'mine_nowhere'; have mine_nowhere.py in the folder"),
        ("mine_alone:Mine", {"sclae": 1}, "mine_alone:Mine, which takes scale, power: .*'sclae'"),
        ("__main__:Mine", {}, "no worker can import __main__"),
    ],
)
def test_what_will_not_do_says_why(home: Path, name: str, options: dict, said: str) -> None:
    own_modules("mine_alone:Mine")
    with pytest.raises(ValueError, match=said):
        find_own(name, options)


def test_a_config_names_a_known_objective_or_a_class() -> None:
    with pytest.raises(ValueError, match=r"no objective 'simcrl'; there are .* did you mean simclr\?"):
        _config(objective="simcrl")
    with pytest.raises(ValueError, match=r"no objective .a\.py:B C.; .* of your own is MODULE:CLASS"):
        _config(objective="a.py:B C")
    with pytest.raises(ValueError, match="objective_options has no effect with objective=byol"):
        _config(objective="byol", objective_options={"scale": 1})
    with pytest.raises(ValueError, match="temperature has no effect with objective=mine:Mine"):
        _config(objective="mine:Mine", temperature=0.2)
