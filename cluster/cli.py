"""The `diptych` command, composed of the packages' commands."""

import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts.config
from cyclopts import App, CycloptsError, Parameter, validators
from cyclopts.argument import ArgumentCollection
from pydantic import ValidationError

from cluster.columns import Columns
from cluster.messages import wrong_fields
from training.config import (
    FeatureName,
    FinetuneConfig,
    ProbeConfig,
    ProtocolName,
    TrainConfig,
    shipped_config,
)


def _read_config(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill the flags that were not given from the TOML file that CONFIG names."""
    given = {argument.name: argument.tokens[0].value for argument in arguments if argument.tokens}
    if "CONFIG" in given and "--resume" in given:
        raise ValueError("give a CONFIG or --resume RUN, not both: a run has its own config")
    if "CONFIG" in given:
        name = given["CONFIG"]
        path = Path(name) if Path(name).is_file() else shipped_config(name)
        values = _parsed(path.read_text(), str(path))
        values.setdefault("name", path.stem)
    elif "--resume" in given:
        path, values = _config_of_run(given["--resume"])
    else:
        return
    for command in reversed(commands):  # A flat table would lose `data`, which is a command's name too.
        values = {command: values}
    cyclopts.config.Dict(values, source=str(path))(app, commands, arguments)


def _parsed(content: str, path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def _config_of_run(run: str) -> tuple[str, dict[str, Any]]:
    """Where the run's config is, and what it says; the run may have been moved."""
    from pipelines import storage  # Takes half a second to import.

    run = storage.absolute(run.rstrip("/"))
    path = storage.join(run, "config.toml")
    content = storage.read(path)
    if content is None:
        raise ValueError(f"{run} is no run: there is no config.toml; give OUTPUT/NAME of one")
    output, _, name = run.rpartition("/")
    return path, _parsed(content.decode(), path) | {"output": output, "name": name}


Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]

app = App(
    name="diptych",
    help="Pre-train image encoders without labels, on any Ray cluster.",
    version=version("diptych"),
    config=_read_config,
    default_parameter=Parameter(negative_iterable=()),
    result_action="return_value",
)


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
    # torch takes seconds to import; help and an error in the config should not.
    from cluster.train import run_training

    run_training(run)


@app.command
def tune(
    search: Path,
    /,
    *,
    trials: int | None = None,
    concurrent: int | None = None,
    name: str | None = None,
    output: str | None = None,
) -> None:
    """Search for the values of any keys of a training config; best.toml then goes to `diptych train`.

    Parameters
    ----------
    search
        A TOML file with the tables `train` (a training config) and `space` (distributions of its keys).
    trials
        How many combinations are tried.
    concurrent
        Trials that run at a time.
    name
        The search's name; it is written to OUTPUT/NAME.
    output
        Where searches are written: a path, file://, s3://, gs:// or az://.
    """
    from cluster.tune import read_search, run_tuning

    flags = {"trials": trials, "concurrent": concurrent, "name": name, "output": output}
    run_tuning(read_search(search, {key: value for key, value in flags.items() if value is not None}))


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


data = App(
    name="data", help="Pack, inspect, preview and embed data sets; a data set is what --data.train takes."
)
app.command(data)

# The settings of how images are read, as flags without a prefix.
ColumnFlags = Annotated[Columns, Parameter(name="*")]


@data.command
def pack(
    source: str,
    dest: str,
    /,
    *,
    rows_per_shard: Count | None = None,
    rows_per_group: Count | None = None,
    shuffle: int | None = None,
    columns: ColumnFlags = Columns(),  # noqa: B008
) -> None:
    """Write images as Parquet shards; their bytes are kept. The same command goes on after an interruption.

    Parameters
    ----------
    source
        A data set, or one of torchvision's, as 'torchvision:CIFAR10?root=DIR&train=true': the arguments are
        the class's; with download=true it is fetched. On a cluster, DIR must be there on every node.
    dest
        Folder of the shards: a path, file://, s3://, gs:// or az://.
    rows_per_shard
        Images of a shard; unset: about 128 MB of them.
    rows_per_group
        Images of a row group, which is read at once; unset: about 8 MB of them, at most 1,024.
    shuffle
        Seed by which images are put in another order, for those sorted by class; unset: the source's order.
    """
    from cluster.data import run_pack

    sizes = {"rows_per_shard": rows_per_shard, "rows_per_group": rows_per_group}
    run_pack(source, dest, columns, **sizes, shuffle=shuffle)


@data.command
def inspect(
    uri: str,
    /,
    *,
    decode: bool = False,
    json: bool = False,
    columns: ColumnFlags = Columns(),  # noqa: B008
) -> None:
    """Count the images of a data set by class, size, format and fault.

    Parameters
    ----------
    uri
        A data set.
    decode
        Decode every image too, to find those that are broken behind their header.
    json
        Print JSON.
    """
    from cluster.data import run_inspect

    run_inspect(uri, columns, decode=decode, as_json=json)


@data.command
def preview(
    uri: str,
    /,
    *,
    output: Annotated[str, Parameter(alias="-o")] = "preview.png",
    recipe: str | None = None,
    size: Annotated[int, Parameter(validator=validators.Number(gte=8))] | None = None,
    seed: int = 0,
    images: Count = 12,
    columns: ColumnFlags = Columns(),  # noqa: B008
) -> None:
    """Draw a contact sheet: images, and the first and the second view of each.

    Parameters
    ----------
    uri
        A data set.
    output
        The PNG to write: a path, file://, s3://, gs:// or az://.
    recipe
        Named recipe of the views: simclr, simclr-cifar, byol, supervised or evaluation; unset: simclr.
    size
        Height and width of the views; unset: the recipe's.
    seed
        Seed of the views.
    images
        How many images, taken evenly from the data set.
    """
    from cluster.data import run_preview

    run_preview(uri, output, columns, recipe=recipe, size=size, seed=seed, images=images)


@data.command
def embed(
    run: str,
    uri: str,
    dest: str,
    /,
    *,
    checkpoint: int | None = None,
    rows_per_shard: Count | None = None,
    columns: ColumnFlags = Columns(),  # noqa: B008
) -> None:
    """Write the features of images by a run's encoder as Parquet: key, path, label and feature.

    They are seen as the run's evaluation sees them. The same command goes on after an interruption.

    Parameters
    ----------
    run
        OUTPUT/NAME of the run: a path, file://, s3://, gs:// or az://.
    uri
        A data set.
    dest
        Folder of the shards: likewise.
    checkpoint
        Step of the checkpoint; unset: the newest.
    rows_per_shard
        Images of a shard; unset: 8,192.
    """
    from cluster.data import run_embed

    run_embed(run, uri, dest, columns, step=checkpoint, rows_per_shard=rows_per_shard)


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
