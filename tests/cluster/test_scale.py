"""diptych scale: the family's configs, as `diptych train` takes them."""

import tomllib
from pathlib import Path

import pytest

from cluster.cli.main import main
from training.config import TrainConfig
from training.config.encoder import EncoderConfig
from training.models.encoders import encoder_cost

_BASE = "simclr-imagenet-efficientnet-b0"


def _configs(folder: Path) -> dict[str, TrainConfig]:
    return {path.stem: TrainConfig(**tomllib.loads(path.read_text())) for path in folder.glob("*.toml")}


def test_a_family_is_written_and_what_it_costs_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["scale", _BASE, "--train", "/data", "--output", str(tmp_path), "--phi", "0", "--phi", "2"])
    said = capsys.readouterr().out
    assert "by the equation, multiply-adds grow 1.92 times with each phi" in said
    # 224 pixels give last maps of 7 x 7, and 258 of 9 x 9.
    zero, one = (
        encoder_cost(EncoderConfig(name="efficientnet", alpha=1.2, beta=1.1, phi=phi), size).multiply_adds
        for phi, size in ((0.0, 224), (1.0, 258))
    )
    assert one / zero == pytest.approx(2.73, abs=0.2)
    assert f"measured, phi 1 costs {one / zero:.2f} times phi 0" in said
    assert "    0   1.00   1.00     224     4,007,548    384,534,752        1.00        1.00" in said
    configs = _configs(tmp_path)
    assert set(configs) == {f"{_BASE}-compound-phi0", f"{_BASE}-compound-phi2"}
    grown = configs[f"{_BASE}-compound-phi2"]
    assert grown.name == f"{_BASE}-compound-phi2"
    encoder = grown.encoder
    assert (encoder.alpha, encoder.beta, encoder.gamma, encoder.phi) == (1.2, 1.1, 1.15, 2.0)
    assert grown.data.view.size == 296
    assert grown.optimizer.name == "lars"


def test_a_family_of_a_family_s_config_starts_there(tmp_path: Path) -> None:
    main(
        ["scale", _BASE, "--train", "/data", "--output", str(tmp_path), "--phi", "0", "--dimension", "width"]
    )
    (path,) = tmp_path.glob("*.toml")
    main(
        ["scale", str(path), "--output", str(tmp_path / "more"), "--phi", "1", "--alpha", "2", "--beta", "1"]
    )
    (config,) = _configs(tmp_path / "more").values()
    assert (config.encoder.alpha, config.encoder.beta, config.encoder.gamma) == (2.0, 1.0, 1.0)
    assert config.data.view.size == 224


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([_BASE], "names no training images; give --train URI"),
        ([_BASE, "--train", "/data", "--dimension", "depth", "--beta", "2"], "--beta has no effect with"),
        (["simclr-cifar10-resnet20", "--train", "/data"], "encoder.name=resnet20 cannot be scaled"),
        (["nowhere"], "no config 'nowhere': neither a TOML file nor one of"),
    ],
)
def test_what_cannot_be_scaled_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["scale", *arguments, "--output", str(tmp_path / "none")])
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "none").exists()
