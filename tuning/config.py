"""Settings of a search."""

from collections.abc import Callable
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass

from pipelines.config import STRICT, Share
from pipelines.plan import check_lanes
from training.config import Count, Positive, TrainConfig, check_micro_batches, worker_counts
from tuning.space import Point, Space, drawn_points, first_message, grid_points, parse_space, with_values

# Each metric's key in a run's metrics.jsonl.
METRICS = {"knn": "knn_top1", "linear": "linear_top1"}

# Numbers of images, each of which must be a multiple or a divisor of the others.
_BATCHES = ("lanes", "batch_size", "micro_batch_size")

# Schedulers of earlier versions.
_REMOVED = ("hyperband", "population")


def _metric(name: str) -> str:
    if name in METRICS:
        return name
    if "loss" in name:
        raise ValueError(
            "temperature and batch size move the loss's scale, so it cannot rank trials; try knn"
        )
    if "test" in name:
        raise ValueError("a search never sees the test images, which are for its winner; try knn")
    raise ValueError(f"no such metric; choose one of {', '.join(METRICS)}")


def _scheduler(name: Any) -> Any:
    if name in _REMOVED:
        raise ValueError("it was removed; use asha, which also stops trials early, or none")
    return name


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SearchConfig:
    """A search: trials of a training config, ranked by accuracy on held-out training images."""

    train: TrainConfig
    """The training config that all trials share."""
    space: dict[str, Any] = field(default_factory=dict)
    """The distribution of each searched key, such as `temperature = { loguniform = [0.05, 1.0] }`. With
    `when = { "optimizer.name" = "sgd" }`, the key is searched only if that other key has that value."""
    compound: bool = False
    """Also search EfficientNet's alpha, beta and gamma, at phi = 1, with alpha * beta^2 * gamma^2 = 2 and 1.8
    to 2.2 times the multiply-adds of phi 0 at `train.data.view.size`. Trials are then ranked by accuracy *
    (multiply-adds / twice those of phi 0)^-0.07."""
    metric: Annotated[str, AfterValidator(_metric)] = "knn"
    """Accuracy by which trials are ranked: knn, or linear for a linear probe. The loss cannot rank trials,
    because temperature and batch size change its scale. Test images are never used."""
    trials: Count = 8
    """Number of trials."""
    max_minutes: Positive | None = None
    """End the search after this many minutes; `diptych tune resume` resumes it. Unset: no limit."""
    held_out: Share = 0.1
    """Share of the training images to rank trials by; trials do not train on them."""
    concurrent: Count = 1
    """Trials that run at the same time; fewer if the cluster is too small."""
    scheduler: Annotated[Literal["asha", "none"], BeforeValidator(_scheduler)] = "asha"
    """When a trial stops. asha: after 1, 4, 16 ... evaluations a trial pauses until it is among the best
    quarter of the trials that got as far; the others stop early (Li et al. 2020). none: every trial trains to
    the end."""
    searcher: Literal["random", "grid", "tpe"] = "random"
    """How the values of a trial are chosen. random: drawn independently. tpe: drawn near values that did well
    in earlier trials (Bergstra et al. 2011, by Optuna). grid: all combinations; `trials` is ignored."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the drawn values and of the choice of held-out images."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "search"
    """The search's name; its folder is OUTPUT/NAME."""
    output: str = "runs"
    """Where searches are written: a path, file://, s3://, gs:// or az://."""

    def __post_init__(self) -> None:
        if self.train.data.test is not None:
            raise ValueError("train.data.test: a search never sees the test images; leave it out")
        if self.train.evaluation.held_out is not None:
            raise ValueError("train.evaluation.held_out: a search has its own held_out; set that")
        if self.scheduler != "none" and self.train.evaluation.every_epochs == 0:
            raise ValueError(
                f"scheduler={self.scheduler} needs evaluations to look at; set train.evaluation.every_epochs"
            )
        space = self.distributions
        if self.searcher == "grid":
            self._check_grid(space)
        self._check_batches(space)
        self._check_values(space)

    @property
    def distributions(self) -> Space:
        """The distribution of each searched key of the training config, by dotted key."""
        if self.compound and not self.space:
            return {}
        return parse_space(self.space, self.train)

    def points(self, space: Space, kept: Callable[[Point], bool] = lambda point: True) -> list[Point]:
        """The points of `space` that a grid or random search tries; drawn points must pass `kept`."""
        if self.searcher == "grid":
            return grid_points(space)
        return drawn_points(space, self.seed, self.trials, kept)

    def _check_grid(self, space: Space) -> None:
        if self.compound:
            raise ValueError("compound=true has no grid of values; set searcher to random or tpe")
        for key, distribution in space.items():
            if not distribution.finite:
                kind = distribution.kind
                raise ValueError(
                    f"searcher=grid tries all values, and {key} is {kind}; give it choice = [...]"
                )

    def _check_batches(self, space: Space) -> None:
        """Raises ValueError if lanes, batch and micro-batch do not fit together in some trial."""
        some = {key: space[key] for key in _BATCHES if key in space and space[key].finite}
        for point in grid_points(some):
            drawn = {key: getattr(self.train, key) for key in _BATCHES} | point
            try:
                check_lanes(drawn["batch_size"], drawn["lanes"])
                if drawn["micro_batch_size"] is not None:
                    check_micro_batches(drawn["batch_size"], drawn["micro_batch_size"], drawn["lanes"])
            except ValueError as error:
                named = ", ".join(f"{key}={value}" for key, value in point.items())
                raise ValueError(f"space: {named}: {error}") from error

    def _check_values(self, space: Space) -> None:
        """Raises ValueError if a value of some key makes the training config invalid."""
        # Drawn lanes, batch and micro-batch fit each other, but perhaps not those of `train`.
        batches = {key: space[key].values[0] for key in _BATCHES if key in space and not space[key].when}
        for key, distribution in space.items():
            others = {other: wanted[0] for other, wanted in distribution.when.items()}
            for value in distribution.examples:
                self._check_value(key, value, batches | others)

    def _check_value(self, key: str, value: Any, others: Point) -> None:
        try:
            config = with_values(self.train, {**others, key: value})
            check_lanes(config.batch_size, config.lanes)
            worker_counts(config)
        except ValueError as error:
            raise ValueError(f"space: {key}={value}: {first_message(error)}") from error
