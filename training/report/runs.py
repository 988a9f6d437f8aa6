"""The page of a run, and of several runs compared: what is in it, and where it is written."""

import platform
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pickle import UnpicklingError
from typing import Any

from pipelines import storage
from training.checkpoint import Checkpoints
from training.config import TrainConfig, config_hash, training_recipes
from training.config.objective import objective_title
from training.report.curves import curves, feature_curves, run_colours
from training.report.features import affordable_images, sample_features
from training.report.history import RunHistory, read_history, read_run
from training.report.images import feature_map, neighbours, pixelated, view_columns
from training.report.page import plotly_script, render_template
from training.report.summary import differing_rows, measurements, settings, summary_rows
from training.report.verdict import verdict
from training.run_folder import to_toml

# What the encoder may spend: about a minute of two cores for the command, and seconds at a run's end.
COMMAND_MULTIPLY_ADDS, END_MULTIPLY_ADDS = 2e12, 2e11

# Reasons that are listed; the rest are counted together.
_REASONS = 12

# Raised by a checkpoint that is damaged or of another network.
_UNREADABLE = (ValueError, OSError, RuntimeError, EOFError, KeyError, UnpicklingError)


def write_report(config: TrainConfig, multiply_adds: float = END_MULTIPLY_ADDS) -> str:
    """Write RUN/report.html from the run's files; returns its URI."""
    run = read_history(config)
    uri = storage.join(run.uri, "report.html")
    storage.write(uri, render(run, multiply_adds).encode())
    return uri


def write_reports(places: Sequence[str], output: str | None) -> str:
    """Write the page of the run, or of several compared, to `output`; returns its URI.

    By default that is RUN/report.html, or comparison.html beside the first of several. Raises ValueError if
    there is no such run, one is named twice, or the page cannot be written.
    """
    runs = [read_run(place) for place in places]
    twice = [run.uri for number, run in enumerate(runs) if run.uri in [each.uri for each in runs[:number]]]
    if twice:
        raise ValueError(f"{twice[0]} is named twice; name different runs to compare them")
    if len(runs) == 1:
        uri, content = storage.join(runs[0].uri, "report.html"), render(runs[0], COMMAND_MULTIPLY_ADDS)
    else:
        uri = storage.join(runs[0].config.output, "comparison.html")
        content = render_comparison(_by_name(runs))
    uri = storage.absolute(output) if output else uri
    try:
        storage.write(uri, content.encode())
    except OSError as error:
        raise ValueError(
            f"cannot write {uri}: {storage.first_line(error)}; choose another --output"
        ) from error
    return uri


def render(run: RunHistory, multiply_adds: float) -> str:
    """The page of one run; the encoder embeds as many images as `multiply_adds` allow."""
    config = run.config
    saved, missing = _newest_checkpoint(run)
    views = view_columns(run.views, len(training_recipes(config))) if run.views else None
    return render_template(
        "run.html",
        name=config.name,
        subtitle=(
            f"{objective_title(config.objective)}, {config.encoder.name}, {config.data.train}, config "
            f"{config_hash(config)}"
        ),
        verdict=verdict(run),
        facts=measurements(run),
        config=to_toml(config),
        summary=settings(run),
        views=views,
        quarantined=_quarantined(run),
        versions=_versions(saved),
        **_curves({config.name: run}),
        **(_features(run, saved, multiply_adds) if saved else {"features_note": missing}),
        **_command(run),
    )


def render_comparison(runs: Mapping[str, RunHistory]) -> str:
    """The page of several runs by their names: side by side, and their curves over each other."""
    return render_template(
        "comparison.html",
        name=f"{len(runs)} runs",
        subtitle=", ".join(runs),
        facts=[],
        config="\n".join(f"# {name}\n{to_toml(run.config)}" for name, run in runs.items()),
        names=list(runs),
        summary=summary_rows(runs),
        differences=differing_rows(runs),
        first_run=shlex.quote(next(iter(runs.values())).uri),
        versions=_versions(None),
        **_curves(runs),
    )


def _by_name(runs: Sequence[RunHistory]) -> dict[str, RunHistory]:
    """The runs by name, or by URI if two have the same name."""
    names = [run.config.name for run in runs]
    return {run.uri if names.count(run.config.name) > 1 else run.config.name: run for run in runs}


def _newest_checkpoint(run: RunHistory) -> tuple[dict[str, Any] | None, str]:
    """Its content; or None, and why."""
    try:
        saved = Checkpoints(run.uri, run.config.checkpoint.keep).latest()
    except _UNREADABLE as error:
        return None, f"The newest checkpoint cannot be read: {_first_line(error)}"
    return saved, "There is no checkpoint yet; once there is, diptych report shows what the encoder sees."


def _curves(runs: Mapping[str, RunHistory]) -> dict[str, Any]:
    return {
        "curves": curves(runs),
        "feature_curves": feature_curves(runs),
        "run_colours": run_colours(runs),
        "plotly_script": plotly_script(),
    }


def _features(run: RunHistory, saved: dict[str, Any], multiply_adds: float) -> dict[str, Any]:
    """The feature map and neighbours, or notes on why there are none."""
    images = affordable_images(run.config, multiply_adds)
    if not images:
        command = f"diptych report {shlex.quote(run.uri)}"
        return {"features_note": f"With an encoder of this size this takes a while: {command}"}
    try:
        sample = sample_features(run.config, saved, images)
    except _UNREADABLE as error:
        return {"features_note": f"The images cannot be shown: {_first_line(error)}"}
    found = {"features_note": "", "neighbours": neighbours(sample), "pixelated": pixelated(sample)}
    try:
        return {**found, "feature_map": feature_map(sample), "feature_map_note": ""}
    except ValueError as error:
        return {**found, "feature_map_note": _first_line(error)}


def _quarantined(run: RunHistory) -> list[list[str]]:
    reasons = run.quarantined.most_common()
    rows = [[f"{count:,}", reason] for reason, count in reasons[:_REASONS]]
    if rest := reasons[_REASONS:]:
        rows.append([f"{sum(count for _, count in rest):,}", f"{len(rest):,} other reasons"])
    return rows


def _command(run: RunHistory) -> dict[str, str]:
    """The command for the same run again; a config in object storage has to be saved first."""
    name = shlex.quote(f"{run.config.name}-again")
    if "://" in run.uri:
        config = config_to_save = f"{run.config.name}.toml"
    else:
        config, config_to_save = shlex.quote(storage.join(run.uri, "config.toml")), ""
    return {"command": f"diptych train {config} --name {name}", "config_to_save": config_to_save}


def _versions(saved: dict[str, Any] | None) -> list[list[str]]:
    """Versions of the packages that the newest checkpoint and this page were made with."""
    rows = [
        [f"{name}, of the newest checkpoint", text]
        for name, text in (saved or {}).get("versions", {}).items()
    ]
    rows += [[f"{name}, of this page", version(name)] for name in ("diptych", "plotly", "scikit-learn")]
    return [*rows, ["Python, of this page", platform.python_version()]]


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
