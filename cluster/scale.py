"""`diptych scale`: write a family of training configs by compound scaling."""

from dataclasses import replace
from pathlib import Path

from cluster.config_file import read_toml
from pipelines import storage
from training.config import TrainConfig, shipped_config
from training.config.encoder import scaling
from training.models.encoders import encoder_cost
from training.run_folder import read_config, to_toml
from tuning.compound import COEFFICIENTS, Coefficients, Dimension, coefficients_of, scaled


def run_scale(
    name: str,
    phis: list[float],
    dimension: Dimension,
    given: dict[str, float],
    train: str | None,
    output: str,
) -> list[str]:
    """Write a config for each phi and print its cost; returns the paths.

    Raises ValueError if there is no such config or it cannot be scaled, before anything is written.
    """
    config = _read(name, train)
    if given and dimension != "compound":
        raise ValueError(f"--{min(given)} has no effect with --dimension {dimension}; leave it out")
    coefficients = COEFFICIENTS[dimension] if dimension != "compound" else coefficients_of(config)
    coefficients = coefficients._replace(**given)
    family = [
        replace(scaled(config, coefficients, phi), name=f"{config.name}-{dimension}-phi{phi:g}")
        for phi in phis
    ]
    base, grown = (encoder_cost(*_measured(scaled(config, coefficients, phi))) for phi in (0.0, 1.0))
    print(_described(coefficients))
    print(f"measured, phi 1 costs {grown.multiply_adds / base.multiply_adds:.2f} times phi 0")
    print("  phi  depth  width  pixels    parameters  multiply-adds  of phi 0's  growth^phi")
    for phi, member in zip(phis, family, strict=True):
        size, cost = scaling(member.encoder), encoder_cost(*_measured(member))
        print(
            f"{phi:5g}  {size.depth:5.2f}  {size.width:5.2f}  {member.data.view.size:6d}  "
            f"{cost.parameters:12,}  {cost.multiply_adds:13,}  "
            f"{cost.multiply_adds / base.multiply_adds:10.2f}  {coefficients.growth**phi:10.2f}"
        )
    paths = [storage.join(storage.absolute(output), f"{member.name}.toml") for member in family]
    for path, member in zip(paths, family, strict=True):
        try:
            storage.write(path, to_toml(member).encode())
        except OSError as error:
            raise ValueError(
                f"cannot write {path}: {storage.first_line(error)}; choose another --output"
            ) from error
        print(path)
    return paths


def _read(name: str, train: str | None) -> TrainConfig:
    """Read the config from a TOML file, a shipped one or a run."""
    path = Path(name)
    try:
        if not path.is_file():
            path = shipped_config(name)
    except ValueError as unknown:
        try:
            config = read_config(name)
        except ValueError:
            raise ValueError(f"{unknown}, nor a run") from None
        return replace(config, data=replace(config.data, train=train)) if train else config
    values = read_toml(path)
    data = values.pop("data", {}) | ({"train": train} if train else {})
    if "train" not in data:
        raise ValueError(f"{path} names no training images; give --train URI")
    return TrainConfig(**values, data=data)


def _measured(config: TrainConfig) -> tuple:
    return config.encoder, config.data.view.size


def _described(coefficients: Coefficients) -> str:
    alpha, beta, gamma = coefficients
    return (
        f"depth {alpha:.4g}^phi, width {beta:.4g}^phi, resolution {gamma:.4g}^phi: "
        f"by the equation, multiply-adds grow {coefficients.growth:.3g} times with each phi"
    )
