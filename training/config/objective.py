"""Settings of the objective and its heads; a setting that has no effect is refused."""

import re
from collections.abc import Mapping, Set
from contextlib import suppress
from dataclasses import asdict
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass

from pipelines.config import STRICT, Probability, Share

Count = Annotated[int, Field(ge=1)]

# Titles of the objectives.
OBJECTIVES: Mapping[str, str] = {"simclr": "SimCLR", "byol": "BYOL", "supervised": "Supervised"}

_OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def objective_title(objective: str) -> str:
    """The objective's name in a report, as SimCLR."""
    return OBJECTIVES.get(objective) or objective.rpartition(":")[2]


def is_own(objective: str) -> bool:
    """Whether the objective is a custom class, MODULE:CLASS."""
    return ":" in objective


def _objective_name(name: str) -> str:
    if name in OBJECTIVES or _OWN.fullmatch(name):
        return name
    near = get_close_matches(name, OBJECTIVES, 1)
    hint = f"did you mean {near[0]}?" if near else "an objective of your own is MODULE:CLASS"
    raise ValueError(f"no objective {name!r}; there are {', '.join(OBJECTIVES)}; {hint}")


ObjectiveName = Annotated[str, AfterValidator(_objective_name)]


def _as_written(value: Any) -> Any:
    """A flag's text as a number or a boolean, if it is one."""
    if value in ("true", "false"):
        return value == "true"
    if isinstance(value, str):
        for kind in (int, float):
            with suppress(ValueError):
                return kind(value)
    return value


Option = Annotated[bool | int | float | str, BeforeValidator(_as_written)]
ContrastiveLoss = Literal[
    "nt-xent", "dcl", "nt-logistic", "nt-logistic-semi-hard", "margin", "margin-semi-hard"
]
ProjectorKind = Literal["non-linear", "linear", "none"]

# At lower ones NT-Xent's exponentials leave float64.
Temperature = Annotated[float, Field(ge=0.002)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProjectorConfig:
    """The head between features and loss."""

    kind: ProjectorKind = "non-linear"
    """non-linear, linear, or none: the loss then compares the features themselves."""
    layers: Annotated[int, Field(ge=2)] = 2
    """Linear layers of the non-linear head, including the last."""
    hidden_dim: Count | None = None
    """Width of the non-linear head's other layers; unset: the features' width, with BYOL 4096."""
    dim: Count | None = None
    """Width of a projection; unset: 128, with BYOL 256."""

    def widths(self, objective: str, features_dim: int) -> tuple[int, ...]:
        """Output widths of the head's linear layers; none with kind=none.

        Unset widths are those of the papers. SimCLR: hidden layers as wide as the features, 128 (Chen et al.
        2020, section 4.2, and the authors' code). BYOL: 4096, 256 (Grill et al. 2020, section 3.3).
        """
        hidden_dim, dim = (4096, 256) if objective == "byol" else (features_dim, 128)
        if self.kind == "none":
            return ()
        hidden = (self.hidden_dim or hidden_dim,) * (self.layers - 1 if self.kind == "non-linear" else 0)
        return (*hidden, self.dim or dim)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SimCLRConfig:
    """Settings of SimCLR alone. Chen et al. 2020."""

    loss: ContrastiveLoss = "nt-xent"
    """nt-xent, dcl (the same without the positive in the denominator; Yeh et al. 2022), nt-logistic, margin
    (triplets); nt-logistic-semi-hard and margin-semi-hard use each row's nearest semi-hard negative alone."""
    margin: Annotated[float, Field(ge=0, le=2)] = 0.4
    """By how much the cosine similarity of a positive should exceed a negative's in triplets."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BYOLConfig:
    """Settings of BYOL alone. Grill et al. 2020."""

    tau_base: Probability = 0.996
    """Share of itself that the target keeps at the first step; it rises to 1 at the last."""
    predictor_hidden_dim: Count = 4096
    """Width of the predictor's hidden layer."""
    views_apart: bool = True
    """Each view goes through the networks by itself and is normalised by its own batch's statistics, as in
    the paper's code; false: both together."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SupervisedConfig:
    """Settings of training with labels alone."""

    classes: Annotated[int, Field(ge=2)] | None = None
    """Labels are whole numbers from 0 to classes - 1; unset: any labels, which are counted."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a label's probability that is spread over all classes."""
    labels: Share | None = None
    """Train on this share of the images that are not held out, with as many of each class as possible;
    unset: all."""


def changed_fields(name: str, part: Any) -> set[str]:
    """The fields of `part` that differ from their defaults, as name.field."""
    default = asdict(type(part)())
    return {f"{name}.{key}" for key, value in asdict(part).items() if value != default[key]}


def check_objective(
    objective: str,
    *,
    options: Mapping[str, Option],
    projector: ProjectorConfig,
    simclr: SimCLRConfig,
    changed: Set[str],
) -> None:
    """Raise ValueError if a changed field has no effect on the objective.

    `changed` names the fields, as projector.dim, whose value is not the default. A field with its default is
    accepted everywhere: a stored config has all of them.
    """
    if options and not is_own(objective):
        raise ValueError(f"objective_options has no effect with objective={objective}; leave it out")
    causes = _without_effect(objective, simclr.loss, projector.kind)
    for field in sorted(changed & set(causes)):
        raise ValueError(f"{field} has no effect with {causes[field]}; leave it out")


def _without_effect(objective: str, loss: ContrastiveLoss, kind: ProjectorKind) -> Mapping[str, str]:
    """Fields that have no effect, each with the reason."""
    heads = {"non-linear": (), "linear": ("layers", "hidden_dim"), "none": ("layers", "hidden_dim", "dim")}
    idle = {f"projector.{field}": f"projector.kind={kind}" for field in heads[kind]}
    idle["temperature" if loss.startswith("margin") else "simclr.margin"] = f"simclr.loss={loss}"
    own = {
        "simclr": {"temperature", *_fields("simclr", SimCLRConfig), *_fields("projector", ProjectorConfig)},
        "byol": {*_fields("byol", BYOLConfig), *_fields("projector", ProjectorConfig)},
        "supervised": _fields("supervised", SupervisedConfig),
    }
    others = set().union(*own.values()) - set(own.get(objective, ()))
    return {**idle, **dict.fromkeys(others, f"objective={objective}")}


def _fields(name: str, part: type) -> set[str]:
    return {f"{name}.{field}" for field in asdict(part())}
