"""Evaluate, export or report a trained run."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from cluster.datasets import absolute, read_index
from cluster.options import EvaluationRequest
from cluster.ray_cluster import cluster
from cluster.terminal import counted, warn
from cluster.train import labelled, labels_known, run_training, training_index
from pipelines import storage
from pipelines.labels import labelled_part, numbered, read_labels, with_labels
from pipelines.storage.checksums import encode_lines
from training.checkpoint import Checkpoints
from training.config import TrainConfig, most_workers
from training.errors import RunError
from training.evaluation.certainty import COMPARED, doubts
from training.evaluation.evaluator import Sets
from training.evaluation.finetune import Protocol, finetune_config
from training.export import WRITERS, read_trained, timm_name, torchvision_name
from training.models.torchvision_models import ARGUMENTS
from training.report import write_reports
from training.run_folder import kept_index, read_config, read_values
from training.trainer import run_uri

if TYPE_CHECKING:
    from training.ray_train.launch import Launch

_FILE = "evaluations.jsonl"

# Formats of an exported encoder, by the ending of its file.
_FORMATS = {".pt": "torchvision", ".pth": "torchvision", ".safetensors": "safetensors", ".onnx": "onnx"}


def run_evaluation(
    run: str,
    request: EvaluationRequest = EvaluationRequest(),  # noqa: B008
    launch: "Launch | None" = None,
) -> dict[str, Any]:
    """Evaluate the encoder of the run in `run`, OUTPUT/NAME; returns the line added to evaluations.jsonl.

    `launch` starts the workers, as for `run_training`. Raises ValueError if there is no such run, checkpoint
    or labelled test set, RunError if a worker fails.
    """
    run = storage.absolute(run.rstrip("/"))
    config = _config(run, request)
    checkpoints = Checkpoints(run, config.checkpoint.keep)
    # A checkpoint that cannot be loaded should fail before a cluster starts.
    chosen = request.checkpoint
    saved = checkpoints.latest(warn) if chosen is None else checkpoints.load(chosen)
    if saved is None:
        raise ValueError(f"{run} has no checkpoint yet; let it train until its first")
    step = saved["step"]
    sets = _sets(run, config)
    if request.protocol == "finetune":
        found = _finetune(config, sets, checkpoints.uri(step), request, launch)
    else:
        found = _frozen(config, sets, request.protocol, step, request, launch)
    for doubt in doubts(found):
        warn(doubt)
    found = {"step": step, "protocol": request.protocol, "labels": request.labels, **found}
    place = storage.join(run, _FILE)
    try:
        storage.write(place, (storage.read(place) or b"") + encode_lines([found]))
    except OSError as error:
        why = storage.first_line(error)
        raise ValueError(f"cannot write {place}: {why}; the result is {json.dumps(found)}") from error
    return found


def _frozen(
    config: TrainConfig,
    sets: Sets,
    name: Literal["knn", "linear"],
    step: int,
    request: EvaluationRequest,
    launch: "Launch | None",
) -> dict[str, Any]:
    if request.labels < 1:
        sets = sets.training_on(labelled(sets.train, config, request.labels), config)
    protocol = Protocol(name=name, step=step, features=request.features, probe=request.probe)
    return _launch(config, sets, protocol, launch)


def _finetune(
    config: TrainConfig, sets: Sets, checkpoint: str, request: EvaluationRequest, launch: "Launch | None"
) -> dict[str, Any]:
    if request.features != "encoder":
        raise ValueError(f"features={request.features} has no effect with protocol=finetune; leave it out")
    train, share = sets.train, request.labels
    with counted(f"labels of {train.uri}", "fragment") as progress:
        train = with_labels(train, config.data, progress)
        train = numbered(train, read_labels(train, config.data, progress))
    tuned_on = labelled_part(train, config.data, share, seed=config.seed) if share < 1 else train
    tuned = finetune_config(
        config, checkpoint, request.finetune, share=share, images=int(tuned_on.rows.sum()),
        classes=len(train.classes) or len(train.label_values),
    )  # fmt: skip
    lines = run_training(tuned, train, sets.test, launch=launch)
    line = lines.having("top1")[-1]
    judged = {key: line[key] for key in ("top1", "top1_margin", *COMPARED) if key in line}
    return {"features": request.features, **judged, "run": run_uri(tuned)}


def _config(run: str, request: EvaluationRequest) -> TrainConfig:
    config = read_config(run)
    if config.supervised.labels is not None:
        read_values(run, resumed=True)  # Earlier versions kept only the index of the labelled share.
    test = absolute(request.test) if request.test else config.data.test
    data = replace(config.data, test=test)
    if not data.test:
        raise ValueError(f"{run} was trained without test images; give labelled ones with --test")
    evaluation = replace(
        config.evaluation,
        neighbours=request.neighbours or config.evaluation.neighbours,
        temperature=request.temperature or config.evaluation.temperature,
    )
    return replace(config, data=data, evaluation=evaluation, workers=request.workers or config.workers)


def _sets(run: str, config: TrainConfig) -> Sets:
    if train := kept_index(run, "train"):
        train.check_unchanged()
    else:
        train = training_index(config)
    train = labels_known(train, config)
    assert config.data.test
    test = labels_known(read_index(config.data.test, config.data, train.classes), config)
    way_out = {train: "give a run with labelled training images", test: "give labelled ones with --test"}
    for index in (train, test):
        index.check_labels("evaluation", way_out[index])
    return Sets.of(config, train, test)


def _launch(config: TrainConfig, sets: Sets, protocol: Protocol, launch: "Launch | None") -> dict[str, Any]:
    # Ray takes seconds to import; a wrong argument should fail sooner.
    from training.ray_train.launch import launch as start_workers
    from training.ray_train.nodes import fitting_workers

    found: dict[str, Any] = {}

    def on_event(event: dict[str, Any]) -> None:
        if "protocol" in event:  # Other events are progress.
            found.update(event)
        elif "waiting" in event:
            print(f"waiting for {event['waiting']}", file=sys.stderr)

    def judge(protocol: Protocol) -> None:
        (launch or start_workers)(
            config, sets, on_event, protocol, workers=fitting_workers(config), stopping=lambda: False
        )

    with cluster(cpus=most_workers(config) * config.cpus_per_worker):
        try:
            judge(protocol)
        except RunError as error:
            if not error.died:
                raise
            print(f"{error}; trying again, with each image first decoded in another process", file=sys.stderr)
            judge(replace(protocol, careful=True))
    return found


def run_export(run: str, dest: str, format: str | None = None, checkpoint: int | None = None) -> None:
    """Write a run's encoder to a file and print how to use it; `checkpoint` is a step, unset: the newest.

    `format` is one of training.export.WRITERS; unset: by the ending of `dest`. Raises ValueError if there is
    no such run or checkpoint, the encoder does not fit the format, or the file cannot be written.
    """
    ending = PurePosixPath(dest).suffix
    format = format or _FORMATS.get(ending)
    if format is None:
        raise ValueError(
            f"{dest} does not tell the format by its ending; end it in {', '.join(_FORMATS)}, or set --format"
        )
    trained = read_trained(run, checkpoint, warn)
    content = WRITERS[format](trained)
    try:
        storage.write(dest, content)
    except OSError as error:
        raise ValueError(f"cannot write {dest}: {storage.first_line(error)}; choose another file") from error
    view, name = trained.config.data.view, trained.config.encoder.name
    print(
        f"{dest}: {name} after {trained.step:,} steps, {len(content) / 2**20:.1f} MiB\n"
        f"input: {view.size} x {view.size} pixels scaled to 0 to 1, minus the mean {view.mean}, divided by "
        f"the standard deviation {view.std}; output: {trained.encoder.dim:,} features"
    )
    if format == "torchvision":
        print(_how_to_load(torchvision_name(trained.config.encoder)))
    if format == "timm":
        model = timm_name(trained.config.encoder)
        print(f'load it with timm.create_model("{model}", checkpoint_path=PATH); the classifier is all zeros')


def _how_to_load(model: str) -> str:
    arguments = "".join(f", {key}={value}" for key, value in ARGUMENTS.get(model, {}).items())
    return (
        f'load it with torchvision.models.get_model("{model}"{arguments}).load_state_dict(torch.load(PATH)); '
        "the classifier is all zeros"
    )


def run_report(runs: Sequence[str], output: str | None) -> None:
    """Write the report and print its path. Raises ValueError as `write_reports` does."""
    print(write_reports(runs, output))
