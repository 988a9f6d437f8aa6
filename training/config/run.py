"""What the user can set about a training run."""

import hashlib
import json
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from pipelines.config import RECIPES, STRICT, DataConfig, Share, Strength, ViewRecipe
from pipelines.plan import check_lanes
from training.config.encoder import TORCHVISION, EncoderConfig, check_view_size
from training.config.objective import (
    BYOLConfig,
    Count,
    ObjectiveName,
    Option,
    ProjectorConfig,
    SimCLRConfig,
    SupervisedConfig,
    Temperature,
    check_objective,
    is_own,
)

Positive = Annotated[float, Field(gt=0)]


def _number_or_range(workers: int | str) -> int | str:
    numbers = str(workers).split(":")
    if len(numbers) > 2 or not all(number.isdecimal() and int(number) for number in numbers):
        raise ValueError(f"needs a number from 1 or FEWEST:MOST, as 1:4, got {workers}")
    if int(numbers[0]) > int(numbers[-1]):
        raise ValueError(f"needs FEWEST:MOST, as 1:4, got {workers}")
    return workers if len(numbers) == 2 else int(workers)


Workers = Annotated[int | str, AfterValidator(_number_or_range)]

ProtocolName = Literal["knn", "linear", "finetune"]
FeatureName = Literal["encoder", "projector"]
TrackerName = Literal["mlflow", "wandb"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """How weights are updated: warm-up, then cosine decay to zero, by step."""

    name: Literal["lars", "sgd", "adamw"] = "lars"
    """LARS (You et al. 2017), SGD with momentum, or AdamW."""
    learning_rate: Positive = 0.3
    """Peak learning rate at 256 images a batch; SimCLR's is 0.3, or 1.2 with scaling=sqrt."""
    scaling: Literal["linear", "sqrt", "none"] = "linear"
    """How the learning rate follows batch_size / 256."""
    weight_decay: Strength = 1e-6
    """Weight decay; biases and batch norm have none."""
    momentum: Share = 0.9
    """Momentum of LARS and SGD; AdamW's first beta."""
    warmup_epochs: Strength = 10.0
    """Epochs in which the learning rate rises from zero; at most a tenth of the run."""
    nesterov: bool = False
    """Nesterov's momentum, of SGD."""
    clip_norm: Positive | None = None
    """Shorten gradients, all taken together, to this length where they are longer; unset: never."""
    average_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep a moving average of the weights, of which each step leaves this share; evaluations, exports and
    embeddings then use the average. Unset: no average."""

    def __post_init__(self) -> None:
        if self.nesterov and self.name != "sgd":
            raise ValueError(f"nesterov has no effect with optimizer.name={self.name}; leave it out")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    """How a run is watched: kNN accuracy of the features (Wu et al. 2018, section 3.4) and diagnostics."""

    every_epochs: Annotated[int, Field(ge=0)] = 0
    """Evaluate after every so many epochs; 0 evaluates before the first step and after the last."""
    held_out: Share | None = None
    """Share of the training images, of each class where they have labels, that is not trained on but
    evaluated; the test images are then looked at after the last step alone. Unset: the test images are
    evaluated each time."""
    diagnostic_images: Annotated[int, Field(ge=0)] = 512
    """Training images for alignment, uniformity and effective rank, which need no labels; 0: no such."""
    neighbours: Count | None = None
    """Neighbours that vote, at most the training images at hand. Unset: 200, or a third of the smallest
    class's training images where that is fewer; metrics.jsonl says how many it was."""
    temperature: Positive = 0.1
    """A neighbour's vote weighs exp(cosine similarity / temperature)."""
    train_images: Count | None = None
    """Use only so many labelled training images as neighbours, of each class in proportion; unset: all. They
    lie all over the data set, most of which is read once for them."""
    test_images: Count | None = None
    """Classify only so many test images, of each class in proportion; unset: all."""
    batch_size: Count = 256
    """Images that a worker embeds at once."""
    linear: bool = False
    """Train a linear probe on the features each time too, which takes a while."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProbeConfig:
    """A linear classifier on frozen features."""

    learning_rates: Annotated[tuple[Positive, ...], Field(min_length=1)] = (
        0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0,
    )  # fmt: skip
    """Learning rates to try; the best on held-out training images is tested."""
    epochs: Count = 90
    """Passes over the features."""
    batch_size: Count = 1024
    """Features in a step."""
    held_out: Share = 0.1
    """Share of the training features by which the learning rate is chosen."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FinetuneConfig:
    """Training on with labels. Chen et al. 2020, appendix B.5: SGD with Nesterov's momentum, no weight decay,
    no warm-up, random crops and flips alone."""

    epochs: Count | None = None
    """Passes over the labelled images; unset: 60 with at most 2 % of the labels, else 30."""
    learning_rate: Positive = 0.05
    """Peak learning rate at 256 images a batch."""
    batch_size: Count | None = None
    """Images in a step; unset: at most 256, and such that an epoch has some eight steps."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """What is saved while training."""

    every_steps: Count = 500
    """Save after every so many steps, and after the last."""
    every_minutes: Positive | None = None
    """Save after so many minutes too; unset: never."""
    keep: Count = 2
    """Keep so many of the newest checkpoints, and the one that was best on held-out images."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """One training run. Its result depends on this alone, and not on where and on what it runs: name, output,
    workers, cpus_per_worker, gpus_per_worker, wait_for_nodes, retries, timeout, trackers."""

    data: DataConfig
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """The run's name; it is written to OUTPUT/NAME."""
    output: str = "runs"
    """Where runs are written: a path, file://, s3://, gs:// or az://."""
    workers: Workers | None = None
    """Worker processes, or FEWEST:MOST, as many as the cluster has room for, which may change while it
    trains; unset: one for each GPU of the cluster that lanes allow, or one."""
    cpus_per_worker: Positive = 2.0
    """Cores that the scheduler sets aside for a worker and for the tasks that read its images."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """GPUs, or the share of one, that a worker has to itself; unset: one, where there are as many."""
    wait_for_nodes: Annotated[float, Field(ge=0)] = 0.0
    """Seconds to wait for nodes with room for the workers, on a cluster that grows by itself; for GPUs name
    gpus_per_worker too. With FEWEST:MOST the run begins with fewer once a minute has brought no more."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How often a run that has lost a worker goes on from its last checkpoint by itself, without having saved
    another one in between."""
    timeout: Annotated[float, Field(ge=1)] = 600.0
    """Seconds that a worker waits for another before the run starts again from its last checkpoint."""
    trackers: tuple[TrackerName, ...] = ()
    """Services that hear of the run's numbers: mlflow, wandb. Where they are, and with which credentials, is
    for their own environment variables to say."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random."""
    lanes: Count = 8
    """Virtual workers: workers must divide lanes, and lanes must divide batch_size."""
    batch_size: Count = 256
    """Images in a step, over all workers."""
    micro_batch_size: Count | None = None
    """Images that go through the networks at a time, over all workers, where batch_size does not fit into
    memory. Gradients are the whole batch's, but batch norm's statistics a micro-batch's. Unset: all."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the networks' forward pass; auto: bfloat16 on a GPU. Losses and weights are in float32."""
    exact: bool = False
    """Weights and losses with the same bits on 1, 2, 4, ... workers (a power of two), on CPUs of one kind;
    without it they agree but for rounding. Kernels then run lane by lane, in one thread of each worker."""
    compile: bool = False
    """Compile the encoder with torch.compile: minutes at the start, faster steps on a GPU."""
    epochs: Count = 100
    """Passes over the training images."""
    steps: Count | None = None
    """Train for so many steps instead of `epochs`."""
    init: str | None = None
    """Another run, OUTPUT/NAME, or one of its checkpoints, whose encoder training starts from; unset: random
    weights."""
    objective: ObjectiveName = "simclr"
    """simclr, byol, supervised (cross entropy with the labels, of the first view alone), or MODULE:CLASS of
    your own: a subclass of training.Objective in a Python file of the folder at hand, or in an installed
    package."""
    objective_options: dict[str, Option] = field(default_factory=dict)
    """What an objective of your own takes, by name."""
    temperature: Temperature | None = None
    """Temperature of SimCLR's NT-Xent, DCL and NT-Logistic; unset: 0.1."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    simclr: SimCLRConfig = field(default_factory=SimCLRConfig)
    byol: BYOLConfig = field(default_factory=BYOLConfig)
    supervised: SupervisedConfig = field(default_factory=SupervisedConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        check_view_size(self.encoder, self.data.view.size)
        if self.micro_batch_size is not None:
            check_micro_batches(self.batch_size, self.micro_batch_size, self.lanes)
        check_objective(
            self.objective,
            options=self.objective_options,
            temperature=self.temperature,
            projector=self.projector,
            simclr=self.simclr,
            byol=self.byol,
            supervised=self.supervised,
        )
        _check_single_images(self)
        _check_second_view(self)
        _check_exact(self)


def training_recipes(config: TrainConfig) -> tuple[ViewRecipe, ...]:
    """How the views that an image is trained on in a step are made: two, or with labels the first alone."""
    return config.data.views[:1] if config.objective == "supervised" else config.data.views


def worker_counts(config: TrainConfig) -> list[int]:
    """The numbers of workers that the config allows, ascending; ValueError where lanes divide by none."""
    if isinstance(config.workers, int):
        check_lanes(config.batch_size, config.lanes, config.workers)
        if config.exact and not _power_of_two(config.workers):
            raise ValueError(
                f"exact=true needs a power of two of workers, not workers={config.workers}; "
                f"try --workers out of {_exact_counts(config.lanes)}"
            )
        return [config.workers]
    fewest, most = map(int, (config.workers or f"1:{config.lanes}").split(":"))
    counts = [count for count in range(fewest, most + 1) if config.lanes % count == 0]
    if config.exact:
        counts = [count for count in counts if _power_of_two(count)]
        if not counts:
            raise ValueError(
                f"exact=true needs workers to be a power of two that divides lanes={config.lanes}; "
                f"none is in workers={config.workers}; take in one of {_exact_counts(config.lanes)}"
            )
    if not counts:
        fits = ", ".join(str(count) for count in range(1, config.lanes + 1) if config.lanes % count == 0)
        raise ValueError(
            f"lanes={config.lanes} is a multiple of no number in workers={config.workers}; take in one of "
            f"{fits}"
        )
    return counts


def _power_of_two(workers: int) -> bool:
    return workers & (workers - 1) == 0


def _exact_counts(lanes: int) -> str:
    """The powers of two that divide `lanes`."""
    return ", ".join(str(n) for n in range(1, lanes + 1) if lanes % n == 0 and _power_of_two(n))


def most_workers(config: TrainConfig) -> int:
    """The largest number of workers that the config names; 1 where it names none."""
    return worker_counts(config)[-1] if config.workers else 1


def check_micro_batches(batch_size: int, micro_batch_size: int, lanes: int) -> None:
    """Raise ValueError unless lanes divide micro_batch_size and that divides batch_size."""
    if micro_batch_size % lanes or batch_size % micro_batch_size:
        fits = [n for n in range(lanes, batch_size + 1, lanes) if batch_size % n == 0]
        near = min(fits, key=lambda n: abs(n - micro_batch_size), default=None)
        hint = f"; try --micro-batch-size {near}" if near else ""
        raise ValueError(
            f"micro_batch_size={micro_batch_size} must be a multiple of lanes={lanes} and divide "
            f"batch_size={batch_size}{hint}"
        )


def _check_single_images(config: TrainConfig) -> None:
    """Raise ValueError where a batch, or a micro-batch, is one image and something needs others beside it."""
    if config.batch_size == 1 and config.objective == "simclr":
        raise ValueError(
            "batch_size=1 leaves SimCLR no other image to tell an image from; "
            f"try --batch-size {max(2, config.lanes)}"
        )
    # Of torchvision's encoders some have no batch norm; all others, and most heads, have.
    heads = config.objective == "byol" or (config.objective == "simclr" and config.projector.kind != "none")
    if not heads and config.encoder.name.startswith(TORCHVISION):
        return
    if config.batch_size == 1:
        raise ValueError(
            f"batch_size=1 leaves batch norm one image alone; try --batch-size {max(2, config.lanes)}"
        )
    if config.micro_batch_size == 1:
        fit = next(size for size in range(2, config.batch_size + 1) if config.batch_size % size == 0)
        raise ValueError(
            f"micro_batch_size=1 leaves batch norm one image alone; try --micro-batch-size {fit}"
        )


def _check_second_view(config: TrainConfig) -> None:
    """Raise ValueError where a second view is described that nothing is trained on."""
    view, second = asdict(config.data.view), asdict(config.data.second_view)
    recipe = asdict(RECIPES[config.data.recipe][1])
    own = [key for key, value in second.items() if value not in (view[key], recipe[key])]
    if config.objective == "supervised" and own:
        raise ValueError(
            f"data.second_view.{own[0]} has no effect with objective=supervised, which trains on the first "
            "view alone; leave it out"
        )


def _check_exact(config: TrainConfig) -> None:
    """Raise ValueError where exact=true is set beside what it cannot make exact."""
    if not config.exact:
        return
    if is_own(config.objective):
        raise ValueError(
            f"exact=true is for simclr, byol and supervised, not objective={config.objective}, which may mix "
            "rows; leave exact out"
        )
    if config.compile:
        raise ValueError("exact=true does not go with compile=true; leave one of them out")
    if config.precision == "bfloat16":
        raise ValueError("exact=true needs precision=float32, not precision=bfloat16; leave one of them out")


def shipped_config(name: str) -> Path:
    """The TOML file of a config that comes with diptych; ValueError, naming them all, if there is none."""
    folder = Path(__file__).parents[1] / "configs"
    if not (path := folder / f"{name}.toml").is_file():
        names = ", ".join(sorted(path.stem for path in folder.glob("*.toml")))
        raise ValueError(f"no config {name!r}: neither a TOML file nor one of {names}")
    return path


# Where a run is written and on how many workers it runs is not part of what it computes; how often it
# saves or evaluates does not change its weights either, but it changes the run's record.
NOT_IDENTITY = (
    "name", "output", "workers", "cpus_per_worker", "gpus_per_worker", "wait_for_nodes", "retries", "timeout",
    "trackers",
)  # fmt: skip


def identity(config: TrainConfig) -> dict[str, Any]:
    """All that a run's result depends on."""
    return {key: value for key, value in asdict(config).items() if key not in NOT_IDENTITY}


def config_hash(config: TrainConfig) -> str:
    """The run's identity in 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:16]
