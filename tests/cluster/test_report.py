"""`diptych report`: bad input ends in one line and exit code 2, and pages are where they were wanted."""

from pathlib import Path

import pytest

from cluster.cli.main import main
from pipelines.config import DataConfig
from training.config import TrainConfig
from training.run_folder import claim_run
from training.trainer import run_uri


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run that has only begun."""
    config = TrainConfig(data=DataConfig(train="/images"), output=str(tmp_path / "runs"), name="young")
    claim_run(run_uri(config), config)
    return run_uri(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/run"], "/nowhere/run is not a run: it has no config.toml; give OUTPUT/NAME of one"),
        (["ftp://bucket/run"], "unknown scheme ftp://"),
        (["s3://key:secret@bucket/run"], "the s3:// URI carries credentials or options"),
        (["{run}", "{run}"], "is named twice"),
        (["{run}", "--output", "/proc/page.html"], "cannot write /proc/page.html"),
        ([], "RUN is missing; see diptych report --help"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["report", *(argument.format(run=run) for argument in arguments)])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert "secret" not in lines[0]


def test_the_page_is_written_into_the_run_or_where_it_was_wanted(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for flags, where in (
        ([], f"{run}/report.html"),
        (["--output", "page.html"], str(tmp_path / "page.html")),
    ):
        main(["report", "runs/young", *flags])
        assert capsys.readouterr().out.strip() == where
        assert "young - diptych" in Path(where).read_text()
