"""The `diptych` command, composed of the packages' commands."""

import sys
from importlib.metadata import version
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter, validators
from pydantic import ValidationError

from cluster.cluster_cli import cluster
from cluster.config_file import read_config_file
from cluster.data_cli import Count, data
from cluster.messages import wrong_fields
from cluster.startup import Startup
from cluster.tune_cli import tune
from training.config import (
    FeatureName,
    FinetuneConfig,
    ProbeConfig,
    ProtocolName,
    TrainConfig,
)

Multiplier = Annotated[float, Parameter(validator=validators.Number(gt=0))]

app = App(
    name="diptych",
    help="Pre-train image encoders without labels, on any Ray cluster.",
    version=version("diptych"),
    config=read_config_file,
    default_parameter=Parameter(negative_iterable=()),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
app.command(cluster)
app.command(data)
app.command(tune)


@app.command
def train(
    config: str | None = None,
    /,
    *,
    resume: str | None = None,
    run: Annotated[TrainConfig, Parameter(name="*")],
) -> None:
    """Train an encoder; every field of the config is a flag.

    Parameters
    ----------
    config
        A TOML file, or the name of a shipped config. Flags take precedence over it.
    resume
        OUTPUT/NAME of a run that goes on from its newest checkpoint, its config being its own.
    """
    startup = Startup.of_the_command()
    # torch takes seconds to import; help and an error in the config should not.
    from cluster.train import run_training

    run_training(run, startup=startup)


@app.command
def scale(
    base: str,
    /,
    *,
    phi: list[float] | None = None,
    dimension: Literal["compound", "depth", "width", "resolution"] = "compound",
    alpha: Multiplier | None = None,
    beta: Multiplier | None = None,
    gamma: Multiplier | None = None,
    train: str | None = None,
    output: str = "scaled",
) -> None:
    """Write the configs of a scaled family of EfficientNets, and print what each costs.

    Parameters
    ----------
    base
        A TOML file, the name of a shipped config, or OUTPUT/NAME of a run: what phi = 0 is.
    phi
        Sizes: the cost doubles with each whole step. Given once for each; unset: 0, 1, 2, 3.
    dimension
        What grows: all three together (compound), or one alone, at the same cost.
    alpha
        Growth of depth with each phi; unset: the config's, or 1.2.
    beta
        Growth of width with each phi; unset: the config's, or 1.1.
    gamma
        Growth of resolution with each phi; unset: the config's, or 1.15.
    train
        The training images, where the config names none.
    output
        The folder of the configs: a path, file://, s3://, gs:// or az://.
    """
    # torch takes seconds to import; help should not.
    from cluster.scale import run_scale

    given = {name: value for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)) if value}
    run_scale(base, phi or [0.0, 1.0, 2.0, 3.0], dimension, given, train, output)


@app.command(name="eval")
def evaluate(
    run: str,
    /,
    *,
    protocol: ProtocolName = "knn",
    labels: Annotated[float, Parameter(validator=validators.Number(gt=0, lte=1))] = 1.0,
    features: FeatureName = "encoder",
    test: str | None = None,
    checkpoint: int | None = None,
    workers: str | None = None,
    neighbours: Count | None = None,
    temperature: Annotated[float, Parameter(validator=validators.Number(gt=0))] | None = None,
    probe: ProbeConfig = ProbeConfig(),  # noqa: B008
    finetune: FinetuneConfig = FinetuneConfig(),  # noqa: B008
) -> None:
    """Judge the encoder of a run on labelled test images.

    Parameters
    ----------
    run
        OUTPUT/NAME of the run: a path, file://, s3://, gs:// or az://.
    protocol
        knn: weighted nearest neighbours. linear: a linear classifier on frozen features, its learning rate
        chosen on held-out training images. finetune: the whole network trained on with labels, as a run of
        its own below RUN/finetune.
    labels
        Share of the training labels of each class that may be used.
    features
        What is judged: the encoder's features, or the projector's output.
    test
        Labelled test images; unset: the run's.
    checkpoint
        Step of the checkpoint; unset: the newest.
    workers
        Worker processes; unset: the run's.
    neighbours
        Neighbours that vote; unset: the run's.
    temperature
        A neighbour's vote weighs exp(cosine similarity / temperature); unset: the run's.
    """
    from cluster.evaluate import Request, run_evaluation

    found = run_evaluation(
        Request(
            run=run, protocol=protocol, labels=labels, features=features, test=test, step=checkpoint,
            workers=workers, neighbours=neighbours, temperature=temperature, probe=probe, finetune=finetune,
        )
    )  # fmt: skip
    at = f", learning rate {found['learning_rate']:g}" if "learning_rate" in found else ""
    print(
        f"{protocol} accuracy of the {features} at step {found['step']} with {labels:.0%} of the labels: "
        f"{found['top1']:.2%}{at}"
    )


@app.command
def export(
    run: str,
    dest: str,
    /,
    *,
    format: Literal["torchvision", "safetensors", "onnx"],
    checkpoint: int | None = None,
) -> None:
    """Write the encoder of a run to a file that other programs read.

    Parameters
    ----------
    run
        OUTPUT/NAME of the run: a path, file://, s3://, gs:// or az://.
    dest
        The file to write: likewise.
    format
        torchvision: a state dict for torchvision's class of the same name, its classifier all zeros.
        safetensors: the weights by name. onnx: the network, for any number of images.
    checkpoint
        Step of the checkpoint; unset: the newest.
    """
    # torch takes seconds to import; help should not.
    from cluster.export import run_export

    run_export(run, dest, format, checkpoint)


@app.command
def demo(*, output: str = "runs") -> None:
    """Train on handwritten digits from a local S3 store: two workers, three minutes, no network.

    Parameters
    ----------
    output
        Where the run is written: a path, file://, s3://, gs:// or az://.
    """
    from cluster.demo import run_demo

    run_demo(output)


def main(arguments: list[str] | None = None) -> None:
    """Run the command of `arguments`, or of the command line; bad input ends in one line and exit code 2."""
    try:
        app(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _fail(_one_line(error))
    except ValidationError as error:
        _fail(wrong_fields(error))
    except ValueError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print(
            "diptych: interrupted; the same command goes on from its last checkpoint or shard",
            file=sys.stderr,
        )
        sys.exit(130)


def _fail(message: str) -> None:
    print(f"diptych: {message}", file=sys.stderr)
    sys.exit(2)


def _one_line(error: CycloptsError) -> str:
    cause = error.__cause__
    return wrong_fields(cause) if isinstance(cause, ValidationError) else " ".join(str(error).split())
