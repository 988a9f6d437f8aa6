"""What runs have left to one HTML page that needs no network."""

import html
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pickle import UnpicklingError
from typing import Any

from pipelines import storage
from training import report_curves, report_pictures
from training.checkpoint import Checkpoints
from training.config import TrainConfig, config_hash, training_recipes
from training.objective_config import objective_title
from training.page import page
from training.record import to_toml
from training.report_glance import differences_table, glance_table, numbers, table, words
from training.report_images import affordable, look
from training.report_run import RunRecord, read_record, read_run

# What the encoder may be asked for: about a minute of two cores for the command, and seconds at a run's end.
COMMAND_MULTIPLY_ADDS, END_MULTIPLY_ADDS = 2e12, 2e11

_STYLE = """
table.plain { width: 100%; table-layout: fixed; margin: 1rem 0; }
.plain th, .plain td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top;
  padding: .35rem .75rem .35rem 0; cursor: auto; }
.plain th::after { content: none; } .plain tr > :first-child { width: 26%; }
@media (max-width: 600px) { .plain tr > :first-child { width: 34%; } }
 .plain td:first-child { color: var(--soft); }
"""

# Reasons that are listed; the rest are counted together.
_REASONS = 12

# What a checkpoint that is torn, or another network's, ends in.
_UNREADABLE = (ValueError, OSError, RuntimeError, EOFError, KeyError, UnpicklingError)


def write_report(config: TrainConfig, multiply_adds: float = END_MULTIPLY_ADDS) -> str:
    """Write RUN/report.html from what the run has left; returns its URI."""
    run = read_record(config)
    uri = storage.join(run.uri, "report.html")
    storage.write(uri, render(run, multiply_adds).encode())
    return uri


def write_reports(places: Sequence[str], output: str | None) -> str:
    """Write the page of the run, or of several to be compared, to `output`; returns its URI.

    Unset, it is RUN/report.html, or comparison.html beside the first of several. Raises ValueError where
    there is no such run, one is named twice, or nothing can be written.
    """
    runs = [read_run(place) for place in places]
    twice = [run.uri for number, run in enumerate(runs) if run.uri in [each.uri for each in runs[:number]]]
    if twice:
        raise ValueError(f"{twice[0]} is named twice; name different runs to compare them")
    if len(runs) == 1:
        uri, content = storage.join(runs[0].uri, "report.html"), render(runs[0], COMMAND_MULTIPLY_ADDS)
    else:
        uri = storage.join(runs[0].config.output, "comparison.html")
        content = render_comparison(_named(runs))
    uri = storage.absolute(output) if output else uri
    try:
        storage.write(uri, content.encode())
    except OSError as error:
        raise ValueError(
            f"cannot write {uri}: {storage.first_line(error)}; choose another --output"
        ) from error
    return uri


def render(run: RunRecord, multiply_adds: float) -> str:
    """The page of one run; the encoder sees as many images as so many multiply-adds allow."""
    config = run.config
    title = f"{objective_title(config.objective)}, {config.encoder.name}"
    saved, missing = _newest_checkpoint(run)
    sections = {
        "At a glance": table([], words(run)),
        "Curves": report_curves.curves({config.name: run}),
        "Images and their views": _views(run),
        "Features": note(missing) if saved is None else _features(run, saved, multiply_adds),
        "Images left out": _left_out(run),
        "The same run again": _again(run),
        "Versions": _versions(saved),
    }
    subtitle = f"{title}, {config.data.train}, config {config_hash(config)}"
    return page(config.name, subtitle, numbers(run), _body(sections), to_toml(config), _styles())


def render_comparison(runs: Mapping[str, RunRecord]) -> str:
    """The page of several runs by their names: side by side, and their curves over each other."""
    sections = {
        "At a glance": glance_table(runs),
        "What differs": differences_table(runs),
        "Curves": report_curves.curves(runs),
        "Images and features": note(f"Each run's own page has them: diptych report {_shown(runs)}"),
        "Versions": _versions(None),
    }
    configs = "\n".join(f"# {name}\n{to_toml(run.config)}" for name, run in runs.items())
    return page(f"{len(runs)} runs", ", ".join(runs), [], _body(sections), configs, _styles())


def note(text: str) -> str:
    """What stands where there is nothing to show, as HTML."""
    return f'<p class="note">{html.escape(text)}</p>'


def _body(sections: Mapping[str, str]) -> str:
    return "".join(f"<section><h2>{heading}</h2>{body}</section>" for heading, body in sections.items())


def _styles() -> str:
    return _STYLE + report_curves.STYLE + report_pictures.STYLE


def _named(runs: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """The runs by their names, or by their URIs where two have one name."""
    names = [run.config.name for run in runs]
    return {run.uri if names.count(run.config.name) > 1 else run.config.name: run for run in runs}


def _shown(runs: Mapping[str, RunRecord]) -> str:
    return shlex.quote(next(iter(runs.values())).uri)


def _newest_checkpoint(run: RunRecord) -> tuple[dict[str, Any] | None, str]:
    """What it holds; or None, and why."""
    try:
        saved = Checkpoints(run.uri, run.config.checkpoint.keep).latest()
    except _UNREADABLE as error:
        return None, f"The newest checkpoint cannot be read: {_first_line(error)}"
    return saved, "There is no checkpoint yet; once there is, diptych report shows what the encoder sees."


def _views(run: RunRecord) -> str:
    if not run.views:
        return note("There is no views.png yet: it is drawn with the first batch.")
    count = len(training_recipes(run.config))
    below = (
        "the two views that the encoder learns to match" if count == 2 else "the view that it is trained on"
    )
    sheet = report_pictures.views_sheet(run.views, count)
    return f'<p class="soft">Above: an image. Below it: {below}.</p>{sheet}'


def _features(run: RunRecord, saved: dict[str, Any], multiply_adds: float) -> str:
    images = affordable(run.config, multiply_adds)
    if not images:
        return note(f"With an encoder of this size this takes a while: diptych report {shlex.quote(run.uri)}")
    try:
        seen = look(run.config, saved, images)
    except _UNREADABLE as error:
        return note(f"The images cannot be shown: {_first_line(error)}")
    near = _or_note(lambda: report_pictures.neighbours(seen))
    return f"{_or_note(lambda: report_pictures.feature_map(seen))}<h2>Nearest neighbours</h2>{near}"


def _or_note(make: Callable[[], str]) -> str:
    try:
        return make()
    except ValueError as error:
        return note(_first_line(error))


def _left_out(run: RunRecord) -> str:
    if not run.left_out:
        return note("None.")
    reasons = run.left_out.most_common()
    rows = [[reason, f"{count:,}"] for reason, count in reasons[:_REASONS]]
    if rest := reasons[_REASONS:]:
        rows.append([f"{len(rest):,} other reasons", f"{sum(count for _, count in rest):,}"])
    return f'<p class="soft">quarantine.jsonl names each.</p>{table(["", "images"], rows)}'


def _again(run: RunRecord) -> str:
    """The command; a config in object storage has to be saved first."""
    name = shlex.quote(f"{run.config.name}-again")
    local = "://" not in run.uri
    config = shlex.quote(storage.join(run.uri, "config.toml")) if local else f"{run.config.name}.toml"
    first = "" if local else f'<p class="soft">Save the config below as {html.escape(config)}, then:</p>'
    return f"{first}<pre>{html.escape(f'diptych train {config} --name {name}')}</pre>"


def _versions(saved: dict[str, Any] | None) -> str:
    rows = [
        [f"{name}, of the newest checkpoint", text]
        for name, text in (saved or {}).get("versions", {}).items()
    ]
    rows += [[f"{name}, of this page", version(name)] for name in ("diptych", "plotly", "scikit-learn")]
    return table([], [*rows, ["Python, of this page", platform.python_version()]])


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
