"""The help of `diptych train`, and the flags that people know from elsewhere."""

import subprocess
import sys

import pytest

from cluster.cli.help import ALL, MEANT, meant
from cluster.cli.main import app, main


def _flags() -> set[str]:
    arguments = app["train"].assemble_argument_collection(parse_docstring=True)
    return {name for argument in arguments if argument.show for name in argument.names}


def test_help_imports_neither_torch_nor_ray() -> None:
    code = "import sys, cluster.cli.main; print(*{'torch', 'torchvision', 'ray', 'nvidia'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "\n"


def test_help_has_panels_examples_and_the_second_view_only_on_demand() -> None:
    short, full = (
        subprocess.run(
            [sys.executable, "-m", "cluster", "train", flag], check=True, capture_output=True, text=True,
            timeout=120, env={"PATH": "/usr/bin:/bin", "COLUMNS": "100"},
        ).stdout
        for flag in ("--help", ALL)
    )  # fmt: skip
    titles = [
        "Common",
        "Views",
        "Data",
        "Encoder",
        "Objective",
        "Optimiser",
        "Evaluation",
        "Checkpoints",
        "Cluster",
    ]
    places = [short.index(f"─ {title} ─") for title in titles]
    assert places == sorted(places)
    assert short.count("diptych train --data.train photos") == 1
    assert "--data.second-view.flip" not in short
    assert "--data.second-view.flip" in full
    for flag in _flags():
        if flag.startswith("--") and len(flag) < 20 and not {*flag} & {".", "_"} and "empty" not in flag:
            assert flag in short
            assert flag in full


@pytest.mark.parametrize("flag", sorted(MEANT))
def test_a_flag_from_elsewhere_is_answered_with_ours(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    ours = MEANT[flag].split()[0]
    assert ours in _flags()
    assert flag not in _flags()
    with pytest.raises(SystemExit) as ended:
        main(["train", "--data.train", "photos", flag, "1"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"diptych: Unknown option: {flag}. Did you mean {MEANT[flag]}?\n"


def test_underscores_and_values_do_not_hide_what_is_meant() -> None:
    assert meant("--image_size=64") == "--data.view.size"
    assert meant("--nothing-like-it") is None
