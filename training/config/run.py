"""Settings of a training run."""

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
    changed_fields,
    check_objective,
    is_own,
)

Positive = Annotated[float, Field(gt=0)]


def _checked_workers(workers: int | str) -> int | str:
    numbers = str(workers).split(":")
    if len(numbers) > 2 or not all(number.isdecimal() and int(number) for number in numbers):
        raise ValueError(f"needs a number from 1 or FEWEST:MOST, as 1:4, got {workers}")
    if int(numbers[0]) > int(numbers[-1]):
        raise ValueError(f"needs FEWEST:MOST, as 1:4, got {workers}")
    return workers if len(numbers) == 2 else int(workers)


Workers = Annotated[int | str, AfterValidator(_checked_workers)]

ProtocolName = Literal["knn", "linear", "finetune"]
FeatureName = Literal["encoder", "projector"]
TrackerName = Literal["mlflow", "wandb"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """How weights are updated. The learning rate warms up, then decays to zero along a cosine, by step."""

    name: Literal["lars", "sgd", "adamw"] = "lars"
    """LARS (You et al. 2017), SGD with momentum, or AdamW."""
    learning_rate: Positive = 0.3
    """Peak learning rate for a batch of 256 images. SimCLR uses 0.3, or 1.2 with scaling=sqrt."""
    scaling: Literal["linear", "sqrt", "none"] = "linear"
    """How the learning rate grows with batch_size / 256: linearly, with its square root, or not at all."""
    weight_decay: Strength = 1e-6
    """Weight decay. Biases and batch norm have none."""
    momentum: Share = 0.9
    """Momentum of LARS and SGD; the first beta of AdamW."""
    warmup_epochs: Strength = 10.0
    """Epochs in which the learning rate rises from zero, limited to a tenth of the run."""
    nesterov: bool = False
    """Use Nesterov momentum, with SGD alone."""
    clip_norm: Positive | None = None
    """Largest norm of all gradients together; larger ones are scaled down to it. Unset: no clipping."""
    average_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep a moving average of the weights, with this decay per step. Evaluations, exports and embeddings
    then use the average. Unset: no average."""

    def __post_init__(self) -> None:
        if self.nesterov and self.name != "sgd":
            raise ValueError(f"nesterov has no effect with optimizer.name={self.name}; leave it out")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    """Evaluation during a run: kNN accuracy of the features (Wu et al. 2018, section 3.4), diagnostics."""

    every_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs between evaluations. 0: evaluate only before the first step and after the last."""
    held_out: Share | None = None
    """Share of the training images to hold out for evaluation, of each class where they have labels. The test
    images are then evaluated only after the last step. Unset: hold out none, and evaluate the test images
    each time."""
    diagnostic_images: Annotated[int, Field(ge=0)] = 512
    """Training images for alignment, uniformity and effective rank, which need no labels. 0: skip these."""
    neighbours: Count | None = None
    """Neighbours that vote, at most all training images. Unset: 200, or a third of the smallest class's
    training images if that is fewer; metrics.jsonl records the number."""
    temperature: Positive = 0.1
    """Temperature of the votes: a neighbour's vote weighs exp(cosine similarity / temperature)."""
    train_images: Count | None = None
    """Labelled training images to use as neighbours, of each class in proportion. They are spread over the
    whole data set, most of which is read once to collect them. Unset: all."""
    test_images: Count | None = None
    """Test images to classify, of each class in proportion. Unset: all."""
    batch_size: Count = 256
    """Images that each worker embeds at a time."""
    linear: bool = False
    """Also train a linear probe on the features at each evaluation, which takes longer."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProbeConfig:
    """A linear classifier on frozen features."""

    learning_rates: Annotated[tuple[Positive, ...], Field(min_length=1)] = (
        0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0,
    )  # fmt: skip
    """Learning rates to try. The best one on held-out training images is tested."""
    epochs: Count = 90
    """Passes over the features."""
    batch_size: Count = 1024
    """Features per step."""
    held_out: Share = 0.1
    """Share of the training features to hold out for choosing the learning rate."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FinetuneConfig:
    """Fine-tuning with labels, as in Chen et al. 2020, appendix B.5: SGD with Nesterov momentum, no weight
    decay, no warm-up, and no augmentation but random crops and flips."""

    epochs: Count | None = None
    """Passes over the labelled images. Unset: 60 with at most 2 % of the labels, otherwise 30."""
    learning_rate: Positive = 0.05
    """Peak learning rate for a batch of 256 images."""
    batch_size: Count | None = None
    """Images per step. Unset: about an eighth of the images, at most 256."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """When checkpoints are saved, and how many are kept."""

    every_steps: Count = 500
    """Steps between checkpoints. The last step is always saved."""
    every_minutes: Positive | None = None
    """Minutes between checkpoints, in addition to every_steps. Unset: save by steps alone."""
    keep: Count = 2
    """Number of the newest checkpoints to keep. The best one on held-out images is kept as well."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """Settings of a training run. They determine its result, except for those that say where it runs: name,
    output, workers, cpus_per_worker, gpus_per_worker, wait_for_nodes, retries, timeout, trackers."""

    data: DataConfig
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run, which is written to OUTPUT/NAME."""
    output: str = "runs"
    """Folder for runs: a path, file://, s3://, gs:// or az://."""
    workers: Workers | None = None
    """Number of worker processes, or a range FEWEST:MOST. With a range the run uses as many as fit on the
    cluster, and changes their number as nodes come and go. Unset: one per GPU of the cluster, as far as
    `lanes` allows, or one without GPUs."""
    cpus_per_worker: Positive = 2.0
    """CPU cores to reserve for each worker and for the tasks that read its images."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """GPUs to reserve for each worker, or a fraction of one. Unset: one, if there are enough for all."""
    wait_for_nodes: Annotated[float, Field(ge=0)] = 0.0
    """Seconds to wait for an autoscaling cluster to add nodes for the workers. For GPU nodes, also set
    gpus_per_worker. With FEWEST:MOST the run starts with fewer workers after a minute without a new node."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How many times in a row a run that has lost a worker resumes from its last checkpoint by itself. Each
    new checkpoint resets the count."""
    timeout: Annotated[float, Field(ge=1)] = 600.0
    """Seconds that a worker waits for the others before the run restarts from its last checkpoint."""
    trackers: tuple[TrackerName, ...] = ()
    """Experiment trackers to send metrics to: mlflow, wandb. Set their addresses and credentials in their own
    environment variables."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of all random numbers."""
    lanes: Count = 8
    """Virtual workers. `lanes` must be a multiple of `workers`, and `batch_size` a multiple of `lanes`."""
    batch_size: Count = 256
    """Images per step, over all workers."""
    micro_batch_size: Count | None = None
    """Images that pass through the networks at a time, over all workers, for batches that do not fit into
    memory. Gradients are the whole batch's, batch norm's statistics a micro-batch's. Unset: batch_size."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward pass; auto: bfloat16 on a GPU, unless `exact` is set. Losses and weights are
    in float32."""
    exact: bool = False
    """Train to the same weights, bit for bit, on any power of two of workers that divides `lanes`, on
    machines of one kind. Slower: layers run lane by lane, in float32 and in one thread of each worker."""
    compile: bool = False
    """Compile the encoder with torch.compile: takes minutes at the start, speeds up steps on a GPU."""
    epochs: Count = 100
    """Passes over the training images."""
    steps: Count | None = None
    """Steps to train for, instead of `epochs`. Unset: `epochs` decides."""
    init: str | None = None
    """Weights that the encoder starts from: another run, OUTPUT/NAME, or one of its checkpoints; a file with
    torchvision's or timm's names; a checkpoint of MoCo, SimSiam, DINO, lightly or solo-learn; or
    torchvision:NAME, that library's download. Unset: random weights."""
    objective: ObjectiveName = "simclr"
    """simclr, byol, supervised (cross entropy with the labels, on the first view alone), or a custom
    MODULE:CLASS: a subclass of training.Objective in a Python file of the current folder or in an installed
    package."""
    objective_options: dict[str, Option] = field(default_factory=dict)
    """Arguments of a custom objective, by name."""
    temperature: Temperature = 0.1
    """Temperature of SimCLR's losses NT-Xent, DCL and NT-Logistic."""
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
            projector=self.projector,
            simclr=self.simclr,
            changed=_changed(self),
        )
        _check_single_images(self)
        _check_second_view(self)
        _check_exact(self)


def _changed(config: TrainConfig) -> set[str]:
    """Settings of the objective that differ from their defaults, as temperature or projector.dim."""
    parts = ("projector", "simclr", "byol", "supervised")
    changed = set().union(*(changed_fields(name, getattr(config, name)) for name in parts))
    return changed | ({"temperature"} if config.temperature != TrainConfig.temperature else set())


def training_recipes(config: TrainConfig) -> tuple[ViewRecipe, ...]:
    """Recipes of the views of an image in a training step: two, or the first alone with labels."""
    return config.data.views[:1] if config.objective == "supervised" else config.data.views


def worker_counts(config: TrainConfig) -> list[int]:
    """Numbers of workers that the config allows, ascending; ValueError if `lanes` is a multiple of none."""
    fits = fitting_counts(config)
    named = ", ".join(map(str, fits))
    if isinstance(config.workers, int):
        if config.exact and config.workers not in fits:
            raise ValueError(
                f"exact=true needs a power of two of workers that divides lanes={config.lanes}, not "
                f"workers={config.workers}; try one of {named}"
            )
        check_lanes(config.batch_size, config.lanes, config.workers)
        return [config.workers]
    fewest, most = map(int, (config.workers or f"1:{config.lanes}").split(":"))
    counts = [count for count in fits if fewest <= count <= most]
    if not counts:
        wanted = "power of two" if config.exact else "number"
        raise ValueError(
            f"lanes={config.lanes} is a multiple of no {wanted} in workers={config.workers}; include one of "
            f"{named}"
        )
    return counts


def fitting_counts(config: TrainConfig) -> list[int]:
    """Numbers of workers that divide `lanes`, ascending; with `exact` only powers of two."""
    counts = [count for count in range(1, config.lanes + 1) if config.lanes % count == 0]
    return [count for count in counts if not (config.exact and count & (count - 1))]


def most_workers(config: TrainConfig) -> int:
    """The largest number of workers that the config allows; 1 where `workers` is unset."""
    return worker_counts(config)[-1] if config.workers else 1


def check_micro_batches(batch_size: int, micro_batch_size: int, lanes: int) -> None:
    """Raise ValueError unless `lanes` divides micro_batch_size and that divides batch_size."""
    if micro_batch_size % lanes or batch_size % micro_batch_size:
        fits = [n for n in range(lanes, batch_size + 1, lanes) if batch_size % n == 0]
        near = min(fits, key=lambda n: abs(n - micro_batch_size), default=None)
        hint = f"; try --micro-batch-size {near}" if near else ""
        raise ValueError(
            f"micro_batch_size={micro_batch_size} must be a multiple of lanes={lanes} and divide "
            f"batch_size={batch_size}{hint}"
        )


def _check_single_images(config: TrainConfig) -> None:
    """Raise ValueError where a batch or micro-batch of one image is too small for the loss or batch norm."""
    if config.batch_size == 1 and config.objective == "simclr":
        raise ValueError(
            "batch_size=1 leaves SimCLR no other image to compare an image with; "
            f"try --batch-size {max(2, config.lanes)}"
        )
    # Some of torchvision's encoders have no batch norm; all other encoders and most heads have.
    heads = config.objective == "byol" or (config.objective == "simclr" and config.projector.kind != "none")
    if not heads and config.encoder.name.startswith(TORCHVISION):
        return
    if config.batch_size == 1:
        raise ValueError(
            f"batch_size=1 gives batch norm a single image; try --batch-size {max(2, config.lanes)}"
        )
    if config.micro_batch_size == 1:
        fit = next(size for size in range(2, config.batch_size + 1) if config.batch_size % size == 0)
        raise ValueError(f"micro_batch_size=1 gives batch norm a single image; try --micro-batch-size {fit}")


def _check_second_view(config: TrainConfig) -> None:
    """Raise ValueError where the second view is set but not trained on."""
    view, second = asdict(config.data.view), asdict(config.data.second_view)
    recipe = asdict(RECIPES[config.data.recipe][1])
    changed = [key for key, value in second.items() if value not in (view[key], recipe[key])]
    if config.objective == "supervised" and changed:
        raise ValueError(
            f"data.second_view.{changed[0]} has no effect with objective=supervised, which trains on the "
            "first view alone; leave it out"
        )


def _check_exact(config: TrainConfig) -> None:
    """Raise ValueError where exact=true is set beside what it cannot make exact."""
    if not config.exact:
        return
    if is_own(config.objective):
        raise ValueError(
            f"exact=true is for simclr, byol and supervised, and objective={config.objective} may mix rows; "
            "leave exact out"
        )
    if config.compile:
        raise ValueError("compile=true does not keep the bits of exact=true; leave one of them out")
    if config.precision == "bfloat16":
        raise ValueError("exact=true needs precision=float32, got precision=bfloat16; leave one of them out")


def shipped_config(name: str) -> Path:
    """TOML file of a config that comes with diptych; ValueError, naming all of them, if there is none."""
    folder = Path(__file__).parents[1] / "configs"
    if not (path := folder / f"{name}.toml").is_file():
        names = ", ".join(sorted(path.stem for path in folder.glob("*.toml")))
        raise ValueError(f"no config {name!r}: neither a TOML file nor one of {names}")
    return path


# Where a run is written and how many workers it has do not change its result. How often it saves or
# evaluates does not change its weights, but it does change its metrics.
NOT_IDENTITY = (
    "name", "output", "workers", "cpus_per_worker", "gpus_per_worker", "wait_for_nodes", "retries", "timeout",
    "trackers",
)  # fmt: skip


def identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that a run's result depends on."""
    return {key: value for key, value in asdict(config).items() if key not in NOT_IDENTITY}


def config_hash(config: TrainConfig) -> str:
    """Hash of the run's identity, as 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:16]
