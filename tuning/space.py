"""A search space: distributions by dotted key, points drawn from them, and a point set in a config. Pure."""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, field, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args

from pydantic.dataclasses import dataclass

from pipelines.config import STRICT
from training.config import NOT_IDENTITY, TrainConfig

Kind = Literal["uniform", "loguniform", "integers", "choice"]
Space = dict[str, "Distribution"]
Point = dict[str, Any]

# Keys that a search sets itself for each trial, or that would change how trials are ranked.
_NOT_SEARCHED = ("data.train", "data.test", "evaluation", *NOT_IDENTITY)

# With few choices there are few distinct points; after this many draws for each, none is left.
_DRAWS_PER_POINT = 100
# Draw for this many more points, so that one is found even if only a few in a hundred are kept.
_SPARE_POINTS = 10


@dataclass(frozen=True, config=STRICT)
class Distribution:
    """The distribution of a key's values: a range (low, high), or choices.

    The key is searched only if each other key in `when` has one of the values given there.
    """

    kind: Kind
    values: tuple[Any, ...]
    when: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    step: int = 1
    """Distance between neighbouring integers."""

    @property
    def choices(self) -> list[Any]:
        """All values of a finite distribution."""
        if self.kind == "choice":
            return list(self.values)
        return [*range(self.values[0], self.values[1] + 1, self.step)]

    @property
    def examples(self) -> list[Any]:
        """Each choice, or the ends of a range and, unless it is of integers, a number between them."""
        if self.finite:
            return list(self.values)
        low, high = self.values
        return [low, low + (high - low) / math.pi, high]

    @property
    def finite(self) -> bool:
        return self.kind in ("choice", "integers")

    def draw(self, generator: random.Random) -> Any:
        """One value."""
        if self.kind == "choice":
            return generator.choice(self.values)
        low, high = self.values
        if self.kind == "integers":
            return low + self.step * generator.randint(0, (high - low) // self.step)
        if self.kind == "uniform":
            return generator.uniform(low, high)
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
        return min(max(value, low), high)  # Rounding may lead just beyond the ends.

    def __post_init__(self) -> None:
        if self.kind == "choice":
            if not self.values:
                raise ValueError("choice needs at least one value")
            return
        if len(self.values) != 2 or not self.values[0] < self.values[1]:
            raise ValueError(f"{self.kind} needs [low, high] with low < high, got {list(self.values)}")
        if self.kind == "integers" and not all(isinstance(value, int) for value in self.values):
            raise ValueError(f"integers needs whole numbers, got {list(self.values)}")
        if self.kind == "loguniform" and self.values[0] <= 0:
            raise ValueError(f"loguniform needs low above 0, got {self.values[0]}")


def parse_space(table: Mapping[str, Any], base: TrainConfig) -> Space:
    """Distributions by dotted key, from a table whose keys may be dotted or nested.

    Raises ValueError for a key that cannot be searched, with the nearest that can, and for a condition on a
    key that is not searched before it.
    """
    space = dict(_flat_space(table))
    if not space:
        raise ValueError(
            "the search space is empty; give a key such as temperature = { choice = [0.1, 0.5] }"
        )
    known = [key for key in _flat_config(asdict(base)) if not key.startswith(_NOT_SEARCHED)]
    for key in space:
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"space: {key!r} cannot be searched{hint}")
    _check_conditions(space)
    return _in_steps_of_lanes(space, base)


def _check_conditions(space: Space) -> None:
    before: list[str] = []
    for key, distribution in space.items():
        for other in distribution.when:
            if other not in before:
                raise ValueError(
                    f"space: {key} has a condition on {other!r}, which is not searched before it; "
                    f"there are {', '.join(before) or 'none'}"
                )
        before.append(key)


def _in_steps_of_lanes(space: Space, base: TrainConfig) -> Space:
    """The space, with batch sizes in steps of the numbers that must divide them."""
    batch_size = space.get("batch_size")
    if batch_size is None or batch_size.kind != "integers":
        return space
    divisors = []
    for key, unset in (("lanes", base.lanes), ("micro_batch_size", base.micro_batch_size or 1)):
        searched = space.get(key)
        divisors += searched.choices if searched and searched.finite else []
        divisors += [unset] if searched is None or searched.when else []
    step, (low, high) = math.lcm(*divisors), batch_size.values
    if low % step or high % step:
        first = max(1, -(-low // step))
        fits = [first * step, max(first + 1, high // step) * step]
        raise ValueError(
            f"space: batch_size={[low, high]} must be multiples of {step}, which lanes and micro_batch_size "
            f"divide; try {fits}"
        )
    return {**space, "batch_size": replace(batch_size, step=step)}


def active(space: Space, point: Point) -> Point:
    """The values of a point whose conditions hold."""
    kept: Point = {}
    for key, distribution in space.items():
        if key in point and all(kept.get(other) in values for other, values in distribution.when.items()):
            kept[key] = point[key]
    return kept


def drawn_points(
    space: Space, seed: int, count: int, kept: Callable[[Point], bool] = lambda point: True
) -> list[Point]:
    """The first `count` distinct points that `seed` draws and `kept` keeps; fewer if there are no more."""
    generator = random.Random(seed)
    draws = (
        {key: distribution.draw(generator) for key, distribution in space.items()}
        for _ in range((count + _SPARE_POINTS) * _DRAWS_PER_POINT)
    )
    return list(itertools.islice(filter(kept, _distinct(space, draws)), count))


def grid_points(space: Space) -> list[Point]:
    """Each combination of values once."""
    combinations = itertools.product(*(distribution.choices for distribution in space.values()))
    return list(_distinct(space, (dict(zip(space, values, strict=True)) for values in combinations)))


def with_values(base: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """`base` with some dotted keys set; ValueError if the result is no valid config."""
    tree = asdict(base)
    # As in a TOML file, `view` sets the second view too unless that is set itself.
    second = {key.replace("data.view.", "data.second_view."): value for key, value in values.items()}
    for key, value in {**second, **values}.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[last] = value
    return TrainConfig(**tree)


def _distinct(space: Space, points: Iterable[Point]) -> Iterator[Point]:
    seen = set()
    for point in points:
        values = active(space, point)
        if (key := repr(values)) not in seen:
            seen.add(key)
            yield values


def _flat_space(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Distribution]]:
    found = []
    for key, value in table.items():
        if not isinstance(value, Mapping):
            raise ValueError(
                f"space: {prefix}{key} must be a table such as {{ choice = [...] }}, got {value!r}"
            )
        kinds = {kind: values for kind, values in value.items() if isinstance(values, list | tuple)}
        if len(kinds) == 1 and set(value) <= {*kinds, "when"}:
            ((kind, values),) = kinds.items()
            found.append((prefix + key, _distribution(prefix + key, kind, values, value.get("when", {}))))
        else:
            found += _flat_space(value, f"{prefix}{key}.")
    return found


def _distribution(key: str, kind: str, values: Iterable[Any], when: Any) -> Distribution:
    kinds = get_args(Kind)
    if kind not in kinds:
        near = get_close_matches(kind, kinds, 1)
        raise ValueError(
            f"space: {key} has no distribution {kind!r}; {near[0] if near else ', '.join(kinds)}?"
        )
    if not isinstance(when, Mapping):
        raise ValueError(f'space: {key} has when = {when!r}; give {{ "other.key" = value }}')
    conditions = {
        other: tuple(wanted) if isinstance(wanted, list | tuple) else (wanted,)
        for other, wanted in when.items()
    }
    # As they are read back from a trial's line: JSON has no tuples.
    listed = [list(value) if isinstance(value, tuple) else value for value in values]
    try:
        return Distribution(kind, tuple(listed), conditions)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise ValueError(f"space: {key}: {first_message(error)}") from error


def first_message(error: ValueError) -> str:
    """The first of pydantic's errors, or the error's own message."""
    errors = getattr(error, "errors", lambda: [{"msg": str(error)}])()
    return errors[0]["msg"].removeprefix("Value error, ")


def _flat_config(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        found += _flat_config(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [prefix + key]
    return found
