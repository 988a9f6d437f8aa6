"""What the user can set about the objective and its heads, and which of it has an effect."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass

from pipelines.config import STRICT, Probability, Share

Count = Annotated[int, Field(ge=1)]

# Objectives by what people call them.
OBJECTIVES: Mapping[str, str] = {"simclr": "SimCLR", "byol": "BYOL", "supervised": "Supervised"}

_OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def objective_title(objective: str) -> str:
    """What people call it."""
    return OBJECTIVES.get(objective) or objective.rpartition(":")[2]


def is_own(objective: str) -> bool:
    """Whether that is a class of the user's own, MODULE:CLASS."""
    return ":" in objective


def _objective_name(name: str) -> str:
    if name in OBJECTIVES or _OWN.fullmatch(name):
        return name
    near = get_close_matches(name, OBJECTIVES, 1)
    hint = f"did you mean {near[0]}?" if near else "an objective of your own is MODULE:CLASS"
    raise ValueError(f"no objective {name!r}; there are {', '.join(OBJECTIVES)}; {hint}")


ObjectiveName = Annotated[str, AfterValidator(_objective_name)]


def _as_written(value: Any) -> Any:
    """A flag's text as the number, or the truth, that it says."""
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

# What unset fields come to, where they have an effect at all.
_LOSS: ContrastiveLoss = "nt-xent"
_KIND: ProjectorKind = "non-linear"
_TEMPERATURE, _MARGIN, _TAU_BASE, _LABEL_SMOOTHING = 0.1, 0.4, 0.996, 0.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProjectorConfig:
    """The head between features and loss."""

    kind: ProjectorKind | None = None
    """non-linear, linear, or none, where the loss takes the features themselves; unset: non-linear."""
    layers: Annotated[int, Field(ge=2)] | None = None
    """Linear layers of the non-linear head, the last included; unset: 2."""
    hidden_dim: Count | None = None
    """Width of the non-linear head's other layers; unset: as wide as the features, BYOL's 4096."""
    dim: Count | None = None
    """Width of a projection; unset: 128, BYOL's 256."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SimCLRConfig:
    """What SimCLR alone has. Chen et al. 2020."""

    loss: ContrastiveLoss | None = None
    """nt-xent, dcl (the same without the positive in the denominator; Yeh et al. 2022), nt-logistic, margin
    (triplets), or one of the latter two over each row's nearest semi-hard negative alone,
    nt-logistic-semi-hard or margin-semi-hard; unset: nt-xent."""
    margin: Annotated[float, Field(ge=0, le=2)] | None = None
    """By how much the cosine similarity of a positive should exceed a negative's in triplets; unset: 0.4."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BYOLConfig:
    """What BYOL alone has. Grill et al. 2020."""

    tau_base: Probability | None = None
    """How much of itself the target keeps at the first step, rising to all at the last; unset: 0.996."""
    predictor_hidden_dim: Count | None = None
    """Width of the predictor's hidden layer; unset: 4096."""
    views_apart: bool | None = None
    """Each view goes through the networks by itself and is normalised by its own batch's statistics, as in
    the paper's code; false: both together; unset: true."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SupervisedConfig:
    """What training with labels alone has."""

    classes: Annotated[int, Field(ge=2)] | None = None
    """Labels are whole numbers from 0 to classes - 1; unset: any labels, which are counted."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of a label's probability that is spread over all classes; unset: 0."""
    labels: Share | None = None
    """Train on this share of the images that are not held out, as many of each class as far as it has them;
    unset: all."""


def contrastive_loss(config: SimCLRConfig) -> ContrastiveLoss:
    """The loss that SimCLR minimises."""
    return config.loss or _LOSS


def margin(config: SimCLRConfig) -> float:
    """The margin of triplets."""
    return _MARGIN if config.margin is None else config.margin


def temperature(given: float | None) -> float:
    """The temperature of NT-Xent or NT-Logistic."""
    return _TEMPERATURE if given is None else given


def tau_base(config: BYOLConfig) -> float:
    """BYOL's tau at the first step."""
    return _TAU_BASE if config.tau_base is None else config.tau_base


def views_apart(config: BYOLConfig) -> bool:
    """Whether BYOL's views go through the networks one after the other."""
    return config.views_apart is not False


def label_smoothing(config: SupervisedConfig) -> float:
    """The share of a label's probability that all classes get."""
    return _LABEL_SMOOTHING if config.label_smoothing is None else config.label_smoothing


def projector_kind(config: ProjectorConfig) -> ProjectorKind:
    """Which head stands between features and loss."""
    return config.kind or _KIND


def check_objective(
    objective: str,
    *,
    options: Mapping[str, Option],
    temperature: float | None,
    projector: ProjectorConfig,
    simclr: SimCLRConfig,
    byol: BYOLConfig,
    supervised: SupervisedConfig,
) -> None:
    """ValueError where something is set that has no effect on the objective."""
    if options and not is_own(objective):
        raise ValueError(f"objective_options has no effect with objective={objective}; leave it out")
    parts = {"projector": projector, "simclr": simclr, "byol": byol, "supervised": supervised}
    given: dict[str, Any] = {"temperature": temperature}
    given |= {f"{name}.{key}": value for name, part in parts.items() for key, value in asdict(part).items()}
    causes = _idle(objective, contrastive_loss(simclr), projector_kind(projector))
    for field, value in given.items():
        if value is not None and field in causes:
            raise ValueError(f"{field} has no effect with {causes[field]}; leave it out")


def _idle(objective: str, loss: ContrastiveLoss, kind: ProjectorKind) -> Mapping[str, str]:
    """The fields that have no effect, and why."""
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
