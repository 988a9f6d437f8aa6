"""What the user can set about a search."""

from collections.abc import Callable
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from pipelines.plan import check_lanes
from pipelines.recipes import STRICT, Share
from training.config import Count, Positive, TrainConfig, check_micro_batches, worker_counts
from tuning.space import Point, Space, drawn_points, first_message, grid_points, parse_space, with_values

# What each metric is called in a run's metrics.jsonl.
METRICS = {"knn": "knn_top1", "linear": "linear_top1"}

# What may change while a run goes on: neither the shape of its weights nor the order of its images.
_CHANGES_ON_THE_WAY = (
    "temperature", "optimizer.learning_rate", "optimizer.weight_decay", "optimizer.momentum",
    "optimizer.clip_norm", "simclr.margin", "byol.tau_base", "data.view.", "data.second_view.",
)  # fmt: skip
# How many images go through the networks at a time: each divides or is divided by the others.
_BATCHES = ("lanes", "batch_size", "micro_batch_size")

_NEVER_ON_THE_WAY = ("data.view.size", "data.second_view.size")


def _metric(name: str) -> str:
    if name in METRICS:
        return name
    if "loss" in name:
        raise ValueError(
            "temperature and batch size move the loss's scale, so it cannot rank trials; try knn"
        )
    if "test" in name:
        raise ValueError("a search never sees the test images, which judge its winner alone; try knn")
    raise ValueError(f"no such metric; there are {', '.join(METRICS)}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SearchConfig:
    """A search: trials of a training config, ranked by accuracy on held-out training images."""

    train: TrainConfig
    """What all trials have in common."""
    space: dict[str, Any] = field(default_factory=dict)
    """For each searched key its distribution, such as `temperature = { loguniform = [0.05, 1.0] }`; with
    `when = { "optimizer.name" = "sgd" }` it is searched where that other key has that value alone."""
    compound: bool = False
    """Search EfficientNet's alpha, beta and gamma too, at phi = 1: where alpha * beta^2 * gamma^2 = 2, and
    phi 1 costs 1.8 to 2.2 times the multiply-adds of phi 0 at `train.data.view.size`. Trials are then ranked
    by accuracy * (multiply-adds / twice those of phi 0)^-0.07."""
    metric: Annotated[str, AfterValidator(_metric)] = "knn"
    """Accuracy by which trials are ranked: knn, or linear, a linear probe's. Never the loss, whose scale
    temperature and batch size move, and never on the test images."""
    trials: Count = 8
    """How many combinations are tried."""
    max_minutes: Positive | None = None
    """End the search after so many minutes; `diptych tune resume` goes on. Unset: after all trials."""
    held_out: Share = 0.1
    """Share of the training images that trials do not train on and are ranked by."""
    concurrent: Count = 1
    """Trials that run at a time; fewer where the cluster has no room for so many."""
    scheduler: Literal["asha", "hyperband", "population", "none"] = "asha"
    """What is done after each evaluation. asha: after 1, 4, 16 ... of them a trial waits, and goes on once it
    is in the best quarter of those that came as far (Li et al. 2020). hyperband: trials wait for each other,
    and the best third go on (Li et al. 2018). population, population-based training: the worst quarter go on
    from the best's weights, with values changed a little (Jaderberg et al. 2017). none: all go to the end."""
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
        if self.train.evaluation.held_out is not None:
            raise ValueError("train.evaluation.held_out: a search has its own held_out; set that")
        if self.scheduler != "none" and self.train.evaluation.every_epochs == 0:
            raise ValueError(
                f"scheduler={self.scheduler} needs evaluations to look at; set train.evaluation.every_epochs"
            )
        if self.scheduler == "hyperband" and self.searcher == "tpe":
            raise ValueError(
                "scheduler=hyperband draws all combinations before it judges one, so searcher=tpe has none "
                "to learn from; set searcher=random or scheduler=asha"
            )
        space = self.distributions
        if self.searcher == "grid":
            self._check_grid(space)
        if self.scheduler == "population":
            self._check_population(space)
        self._check_batches(space)
        # Any of these go together, and not with those of `train`.
        batches = {key: space[key].values[0] for key in _BATCHES if key in space and not space[key].when}
        for key, distribution in space.items():
            others = {other: wanted[0] for other, wanted in distribution.when.items()}
            for value in distribution.examples:
                self._check_value(key, value, batches | others)

    @property
    def distributions(self) -> Space:
        """Each searched key of the training config, dotted, and what its values are drawn from."""
        if self.compound and not self.space:
            return {}
        return parse_space(self.space, self.train)

    def points(self, space: Space, kept: Callable[[Point], bool] = lambda point: True) -> list[Point]:
        """The combinations of `space` that are tried, where none is chosen by how those before it did.

        What is drawn is tried if `kept` says so.
        """
        if self.searcher == "grid":
            return grid_points(space)
        return drawn_points(space, self.seed, self.trials, kept)

    def _check_grid(self, space: Space) -> None:
        if self.compound:
            raise ValueError("compound=true has no grid of values; set searcher to random or tpe")
        for key, what in space.items():
            if not what.finite:
                raise ValueError(
                    f"searcher=grid tries all values, and {key} is {what.kind}; give it choice = [...]"
                )

    def _check_population(self, space: Space) -> None:
        if self.searcher == "tpe" or self.compound:
            raise ValueError(
                "scheduler=population chooses combinations itself; set searcher=random and compound=false"
            )
        if self.searcher == "random" and self.trials < 2:
            raise ValueError(f"scheduler=population needs trials to learn from, got trials={self.trials}")
        for key, what in space.items():
            if not key.startswith(_CHANGES_ON_THE_WAY) or key in _NEVER_ON_THE_WAY:
                raise ValueError(
                    f"scheduler=population changes values while trials go on, and {key} cannot change then; "
                    "search it with scheduler=asha"
                )
            if what.when:
                raise ValueError(f"scheduler=population knows no conditions, and {key} has one; leave it out")

    def _check_batches(self, space: Space) -> None:
        """Whatever is drawn of lanes, batch and micro-batch goes together."""
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

    def _check_value(self, key: str, value: Any, others: Point) -> None:
        try:
            config = with_values(self.train, {**others, key: value})
            check_lanes(config.batch_size, config.lanes)
            worker_counts(config)
        except ValueError as error:
            raise ValueError(f"space: {key}={value}: {first_message(error)}") from error
