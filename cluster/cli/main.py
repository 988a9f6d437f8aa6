"""The `diptych` command: its main commands, and how errors become exit codes."""

import os
import sys
from typing import Annotated, Literal

from cyclopts import CycloptsError, MissingArgumentError, Parameter, UnknownOptionError, validators
from pydantic import ValidationError

from cluster.cli.app import app
from cluster.cli.cluster_commands import cluster
from cluster.cli.data_commands import Count, data
from cluster.cli.help import ALL, EXAMPLES, TrainHelp, meant
from cluster.cli.jobs_commands import jobs, submit
from cluster.cli.tune_commands import tune
from cluster.options import EvaluationRequest
from cluster.signals import Interrupted
from cluster.terminal import Startup
from pipelines.storage.retry import first_line
from training.config import TrainConfig
from training.config.messages import missing, wrong_fields
from training.errors import ClusterLostError, RunError

Multiplier = Annotated[float, Parameter(validator=validators.Number(gt=0))]

app.command(cluster)
app.command(data)
app.command(jobs)
app.command(submit)
app.command(tune)


@app.command(
    help_formatter=TrainHelp(everything=ALL in sys.argv),
    help_epilogue=EXAMPLES,
    help_flags=("--help", "-h", ALL),
)
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
        OUTPUT/NAME of a run to resume from its newest checkpoint, with its own config.
    """
    startup = Startup.of_the_command()
    # torch takes seconds to import; help and a wrong config should be faster.
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
    """Write the configs of a scaled family of EfficientNets, and print the cost of each.

    Parameters
    ----------
    base
        The config for phi = 0: a TOML file, the name of a shipped config, or OUTPUT/NAME of a run.
    phi
        A size; the cost doubles with each whole step. Give it once for each; unset: 0, 1, 2, 3.
    dimension
        The dimension that grows: all three together (compound), or one alone, at the same cost.
    alpha
        Growth of depth with each phi; unset: the config's, or 1.2.
    beta
        Growth of width with each phi; unset: the config's, or 1.1.
    gamma
        Growth of resolution with each phi; unset: the config's, or 1.15.
    train
        The training images, if the config names none.
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
    request: Annotated[EvaluationRequest, Parameter(name="*")] = EvaluationRequest(),  # noqa: B008
) -> None:
    """Evaluate the encoder of a run on labelled test images.

    Parameters
    ----------
    run
        OUTPUT/NAME of the run: a path, file://, s3://, gs:// or az://.
    """
    from cluster.evaluate import run_evaluation

    found = run_evaluation(run, request)
    from training.evaluation.certainty import shown, shown_baselines

    at = f", learning rate {found['learning_rate']:g}" if "learning_rate" in found else ""
    print(
        f"{request.protocol} accuracy of the {request.features} at step {found['step']} with "
        f"{request.labels:.0%} of the labels: {shown(found, 'top1', digits=2)} {shown_baselines(found)}{at}"
    )


@app.command
def export(
    run: str,
    dest: str,
    /,
    *,
    format: Literal["torchvision", "timm", "safetensors", "onnx"] | None = None,
    checkpoint: int | None = None,
) -> None:
    """Write the encoder of a run to a file for other programs.

    Parameters
    ----------
    run
        OUTPUT/NAME of the run: a path, file://, s3://, gs:// or az://.
    dest
        The file to write: a path, file://, s3://, gs:// or az://.
    format
        torchvision, timm: a state dict for the library's model of the same name, with an all-zero classifier.
        safetensors: the weights by name. onnx: the network, for any number of images. Unset: by the ending
        of the file, .pt or .pth (torchvision), .safetensors, or .onnx.
    checkpoint
        Step of the checkpoint; unset: the newest.
    """
    # torch takes seconds to import; help should not.
    from cluster.evaluate import run_export

    run_export(run, dest, format, checkpoint)


@app.command
def report(
    run: Annotated[list[str], Parameter(negative_iterable=())], /, *, output: str | None = None
) -> None:
    """Write one HTML page that shows a run, or compares several; it needs no network.

    Parameters
    ----------
    run
        OUTPUT/NAME of each run, finished or not: a path, file://, s3://, gs:// or az://.
    output
        The file to write: a path or URI; unset: RUN/report.html, or comparison.html beside the first run.
    """
    # torch takes seconds to import; help should not.
    from cluster.evaluate import run_report

    run_report(run, output)


@app.command
def doctor(
    *,
    address: str | None = None,
    storage: str | None = None,
    workers: Count | None = None,
    gpus_per_worker: Annotated[float | None, Parameter(validator=validators.Number(gt=0))] = None,
    wait_for_nodes: Annotated[float, Parameter(validator=validators.Number(gte=0))] = 0.0,
) -> None:
    """Check whether a cluster, or this machine, can train; exit code 1 if something would stop a run.

    Parameters
    ----------
    address
        The cluster's address, as in RAY_ADDRESS; unset: as for every command. From outside the cluster,
        submit it: diptych submit -- doctor.
    storage
        Where runs or images are; every node writes a file there and reads another node's. A path, file://,
        s3://, gs:// or az://.
    workers
        Workers of the gradient self-test; unset: one for each GPU, or as many as the CPUs have room for.
    gpus_per_worker
        GPUs of each worker, or the share of one; unset: one, if there are enough.
    wait_for_nodes
        Request nodes for the workers from the autoscaler, and wait this many seconds for them.
    """
    if address:
        os.environ["RAY_ADDRESS"] = address
    from cluster.doctor.checks import run_doctor

    if run_doctor(storage, workers, gpus_per_worker, wait_for_nodes):
        sys.exit(1)


@app.command
def demo(*, output: str = "runs") -> None:
    """Train on handwritten digits from a local S3 server: two workers, three minutes, no network.

    Parameters
    ----------
    output
        Where the run is written: a path, file://, s3://, gs:// or az://.
    """
    from cluster.demo import run_demo

    run_demo(output)


def main(arguments: list[str] | None = None) -> None:
    """Run the command in `arguments`, or on the command line; bad input prints one line, with exit code 2."""
    try:
        _run(arguments)
    except CycloptsError as error:
        _fail(_one_line(error))
    except ValidationError as error:
        _fail(wrong_fields(error))
    except BrokenPipeError:  # The reader has left, as `| head` does.
        # Else Python would report the same error again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as error:
        _fail(first_line(error))
    except ClusterLostError as lost:
        if not lost.told:
            print(f"diptych: {lost}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # Ray's exit handlers would wait for the cluster.
    except RunError as error:
        sys.exit(f"diptych: {error}")
    except Interrupted as interrupted:
        print(f"\ndiptych: {interrupted}", file=sys.stderr)
        sys.exit(128 + interrupted.number)
    except KeyboardInterrupt:
        print(
            "diptych: interrupted; the same command resumes from its last checkpoint or shard",
            file=sys.stderr,
        )
        sys.stdout.flush()
        sys.stderr.flush()
        # Threads that wait for Ray, or Ray itself, may change the exit code in Python's own shutdown.
        os._exit(130)
    except Exception as error:
        # Ray takes seconds to import.
        if not type(error).__module__.startswith("ray."):
            raise
        what = f"{type(error).__name__}: {first_line(error).rstrip('.')}"
        sys.exit(f"diptych: the Ray cluster failed: {what}; see diptych doctor")


def _run(arguments: list[str] | None) -> None:
    """Run the command; an error during the clean-up after Ctrl-C is raised as KeyboardInterrupt."""
    try:
        app(arguments, exit_on_error=False, print_error=False)
    except Exception as error:
        cause: BaseException | None = error
        while cause := cause.__context__:
            if isinstance(cause, KeyboardInterrupt):
                raise cause from None
        raise


def _fail(message: str) -> None:
    print(f"diptych: {message}", file=sys.stderr)
    sys.exit(2)


def _one_line(error: CycloptsError) -> str:
    if isinstance(error.__cause__, ValidationError):
        return wrong_fields(error.__cause__)
    if isinstance(error, MissingArgumentError) and error.argument and error.keyword is None:
        name = error.argument.name
        if name == "--data.train":
            return missing("data.train")
        return f"{name} is missing; see diptych {' '.join(error.command_chain or ())} --help"
    if isinstance(error, UnknownOptionError):
        flag = error.token.keyword or error.token.value
        if known := meant(flag):
            return f"Unknown option: {flag}. Did you mean {known}?"
    return " ".join(str(error).split())
