"""Search space: dotted config keys to distributions, and a trial's values back into a config. Pure."""

import math
from collections.abc import Mapping
from dataclasses import asdict, field
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipelines.recipes import STRICT, Share
from training.config import Count, TrainConfig

Kind = Literal["uniform", "loguniform", "integers", "choice"]

# What a search sets for each trial itself, or what would change how trials are ranked.
_NOT_SEARCHED = ("data.train", "data.test", "name", "output", "evaluation")


@dataclass(frozen=True, config=STRICT)
class Distribution:
    """What a key's values are drawn from: a range (low, high), or some choices."""

    kind: Kind
    values: tuple[Any, ...]

    @property
    def choices(self) -> list[Any]:
        """All values of a distribution that has so many."""
        return list(self.values) if self.kind == "choice" else [*range(self.values[0], self.values[1] + 1)]

    def __post_init__(self) -> None:
        if self.kind == "choice":
            if not self.values:
                raise ValueError("choice needs at least one value")
            return
        if len(self.values) != 2 or not self.values[0] < self.values[1]:
            raise ValueError(f"{self.kind} needs [low, high] with low < high, got {list(self.values)}")
        if self.kind == "loguniform" and self.values[0] <= 0:
            raise ValueError(f"loguniform needs low above 0, got {self.values[0]}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SearchConfig:
    """A search: trials of a training config, ranked by kNN accuracy on held-out training images.

    Never by the loss, whose scale temperature and batch size move, and never on the test images.
    """

    train: TrainConfig
    """What all trials have in common."""
    space: dict[str, Any] = field(default_factory=dict)
    """For each searched key its distribution, such as `temperature = { loguniform = [0.05, 1.0] }`."""
    compound: bool = False
    """Search EfficientNet's alpha, beta and gamma too, where alpha * beta^2 * gamma^2 = 2, at phi = 1. Trials
    are then ranked by accuracy * (multiply-adds / twice those of phi 0)^-0.07."""
    trials: Count = 8
    """How many combinations are tried."""
    held_out: Share = 0.1
    """Share of the training images, in whole row groups, that trials do not train on and are ranked by."""
    concurrent: Count = 1
    """Trials that run at a time."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha ends trials early that fall behind (Li et al. 2020); it looks after each evaluation."""
    searcher: Literal["random", "grid", "tpe"] = "random"
    """random draws each combination by itself, tpe where those before it did well (Bergstra et al. 2011, by
    Optuna), grid tries all of them: then `trials` is not asked for."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the combinations."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "search"
    """The search's name; it is written to OUTPUT/NAME."""
    output: str = "runs"
    """Where searches are written: a path, file://, s3://, gs:// or az://."""

    def __post_init__(self) -> None:
        if self.train.data.test is not None:
            raise ValueError("train.data.test: a search never sees the test images; leave it out")
        if self.scheduler == "asha" and self.train.evaluation.every_epochs == 0:
            raise ValueError("scheduler=asha needs evaluations to look at; set train.evaluation.every_epochs")
        distributions = self.distributions
        if self.compound and self.searcher == "grid":
            raise ValueError("compound=true has no grid of values; set searcher to random or tpe")
        if self.searcher == "grid":
            for key, what in distributions.items():
                if what.kind not in ("choice", "integers"):
                    raise ValueError(
                        f"searcher=grid tries all values, and {key} is {what.kind}; give it choice = [...]"
                    )

    @property
    def count(self) -> int:
        """How many combinations will be tried."""
        if self.searcher != "grid":
            return self.trials
        return math.prod(len(what.choices) for what in self.distributions.values())

    @property
    def distributions(self) -> dict[str, Distribution]:
        """Each searched key, dotted, and what its values are drawn from."""
        if self.compound and not self.space:
            return {}
        return parse_space(self.space, self.train)


def parse_space(table: Mapping[str, Any], base: TrainConfig) -> dict[str, Distribution]:
    """Dotted keys to distributions, out of a table in which both may be nested.

    Raises ValueError for a key that `base` does not have, with the nearest that it has.
    """
    found = dict(_flat_space(table))
    if not found:
        raise ValueError(
            "the search space is empty; give a key such as temperature = { choice = [0.1, 0.5] }"
        )
    known = {key for key in _flat_config(asdict(base)) if not key.startswith(_NOT_SEARCHED)}
    for key in found:
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"space: {key!r} is no key that can be searched{hint}")
    return found


def with_values(base: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """`base` with some dotted keys set; ValueError where the result is no valid config."""
    tree = asdict(base)
    # As in a TOML file, `view` sets the second view too where that has no value of its own.
    second = {key.replace("data.view.", "data.second_view."): value for key, value in values.items()}
    for key, value in {**second, **values}.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[last] = value
    return TrainConfig(**tree)


def _flat_space(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Distribution]]:
    found = []
    for key, value in table.items():
        if not isinstance(value, Mapping):
            raise ValueError(
                f"space: {prefix}{key} must be a table such as {{ choice = [...] }}, got {value!r}"
            )
        if len(value) == 1 and isinstance(next(iter(value.values())), list | tuple):
            ((kind, values),) = value.items()
            found.append((prefix + key, _distribution(prefix + key, kind, values)))
        else:
            found += _flat_space(value, f"{prefix}{key}.")
    return found


def _distribution(key: str, kind: str, values: list[Any]) -> Distribution:
    kinds = Kind.__args__
    if kind not in kinds:
        near = get_close_matches(kind, kinds, 1)
        raise ValueError(
            f"space: {key} has no distribution {kind!r}; {near[0] if near else ', '.join(kinds)}?"
        )
    return Distribution(kind, tuple(values))  # pyright: ignore[reportArgumentType]


def _flat_config(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        found += _flat_config(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [prefix + key]
    return found
