"""`diptych export`: the encoder of a run to a file."""

from cluster.progress import warn
from pipelines import storage
from training.export import WRITERS, read_trained, torchvision_name
from training.torchvision_models import ARGUMENTS


def run_export(run: str, dest: str, format: str, checkpoint: int | None = None) -> None:
    """Write the encoder of the run's checkpoint of that step, or of its newest, and say how it is used.

    Raises ValueError where there is no such run or checkpoint, the format does not fit, or nothing can be
    written.
    """
    trained = read_trained(run, checkpoint, warn)
    content = WRITERS[format](trained)
    try:
        storage.write(dest, content)
    except OSError as error:
        raise ValueError(f"cannot write {dest}: {storage.first_line(error)}; choose another file") from error
    view, name = trained.config.data.view, trained.config.encoder.name
    print(
        f"{dest}: {name} after {trained.step:,} steps, {len(content) / 2**20:.1f} MiB\n"
        f"images of {view.size} x {view.size} pixels on a scale of 0 to 1, less the mean {view.mean} "
        f"and over the standard deviation {view.std}, to {trained.encoder.dim:,} features"
    )
    if format == "torchvision":
        print(_how_to_load(torchvision_name(trained.config.encoder)))


def _how_to_load(model: str) -> str:
    arguments = "".join(f", {key}={value}" for key, value in ARGUMENTS.get(model, {}).items())
    return (
        f'torchvision.models.get_model("{model}"{arguments}).load_state_dict(torch.load(PATH)) takes it; '
        "the classifier is all zeros"
    )
