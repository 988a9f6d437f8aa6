"""A run's metrics to one HTML page that needs no network."""

import base64
from typing import Any

import plotly.graph_objects as go

from pipelines import storage
from training.config import TrainConfig, config_hash
from training.metrics import read_metrics
from training.page import page
from training.record import to_toml
from training.run import run_uri

_VIEWS = """<h2>Images and their views</h2>
<p class="soft">First row: images. Below each: the two views that the encoder learned to match.</p>
<img alt="Training images, each above its two augmented views" src="data:image/png;base64,{}">
"""

_TITLES = {"simclr": "SimCLR", "byol": "BYOL", "supervised": "Supervised"}

# Readable on a light page and on a dark one.
_GREY = "#8a919e"
_COLOURS = ("#3b82c4", "#d9822b")


def write_report(config: TrainConfig) -> str:
    """Write RUN/report.html from what the run has left; returns its URI."""
    run = run_uri(config)
    uri = storage.join(run, "report.html")
    views = storage.read(storage.join(run, "views.png"))
    storage.write(uri, render(config, read_metrics(run), views).encode())
    return uri


def render(config: TrainConfig, metrics: list[dict[str, Any]], views: bytes | None) -> str:
    """The page; `metrics` are the lines of metrics.jsonl, `views` a PNG."""
    steps = [line for line in metrics if "loss" in line]
    evaluations = [line for line in metrics if "knn_top1" in line]
    diagnoses = [line for line in metrics if "effective_rank" in line]
    left_out = max((line["quarantined"] for line in metrics if "quarantined" in line), default=0)
    title = f"{_TITLES[config.objective]}, {config.encoder.name}"
    subtitle = f"{title}, {config.data.train}, config {config_hash(config)}"
    body = _figures(steps, evaluations, diagnoses)
    if views:
        body += _VIEWS.format(base64.b64encode(views).decode())
    return page(config.name, subtitle, _facts(steps, evaluations, left_out), body, to_toml(config))


def _facts(
    steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], left_out: int
) -> list[tuple[str, str]]:
    facts = [("images left out", f"{left_out:,}")] if left_out else []
    if steps:
        rates = sorted(line["images_per_second"] for line in steps)
        facts += [
            ("steps", f"{steps[-1]['step']:,}"),
            ("epochs", str(steps[-1]["epoch"])),
            ("last loss", f"{steps[-1]['loss']:.3f}"),
            ("images/s, median", f"{rates[len(rates) // 2]:,.0f}"),
        ]
    for line in evaluations[:1]:
        if "knn_top1_pixels" in line:
            facts.append(("kNN, raw pixels", f"{line['knn_top1_pixels']:.1%}"))
        if line["step"] == 0:
            facts.append(("kNN, untrained", f"{line['knn_top1']:.1%}"))
    if evaluations and evaluations[-1]["step"]:
        facts.append(("kNN, trained", f"{evaluations[-1]['knn_top1']:.1%}"))
    return facts


def _figures(
    steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], diagnoses: list[dict[str, Any]]
) -> str:
    figures = []
    if steps:
        figures += [
            _curve("Loss", steps, "loss", "loss"),
            _curve("Learning rate", steps, "learning_rate", "learning rate"),
            _curve("Throughput", steps, "images_per_second", "images per second"),
        ]
    if diagnoses:
        figures += [
            _curve("Alignment: distance of two views, less is better", diagnoses, "alignment", "alignment"),
            _curve("Uniformity: how evenly features spread, less is better", diagnoses, "uniformity", "nats"),
            _curve(
                "Effective rank: directions that features fill", diagnoses, "effective_rank", "directions"
            ),
        ]
    if evaluations:
        figures.insert(0, _accuracy(evaluations))
    return "".join(
        f"<h2>{title}</h2>"
        + figure.to_html(full_html=False, include_plotlyjs=number == 0, config={"displayModeBar": False})
        for number, (title, figure) in enumerate(figures)
    )


def _curve(title: str, lines: list[dict[str, Any]], key: str, axis: str) -> tuple[str, go.Figure]:
    trace = go.Scatter(
        x=[line["step"] for line in lines],
        y=[line[key] for line in lines],
        line={"color": _COLOURS[0], "width": 1.5},
    )
    return title, _styled(go.Figure(trace), axis)


def _accuracy(evaluations: list[dict[str, Any]]) -> tuple[str, go.Figure]:
    x = [line["step"] for line in evaluations]
    figure = go.Figure(
        go.Scatter(
            x=x,
            y=[100 * line["knn_top1"] for line in evaluations],
            mode="lines+markers",
            name="encoder",
            line={"color": _COLOURS[0]},
        )
    )
    pixels = evaluations[0].get("knn_top1_pixels")
    if pixels is not None:
        flat = {"x": [x[0], x[-1]], "y": [100 * pixels] * 2}
        figure.add_trace(
            go.Scatter(**flat, mode="lines", name="raw pixels", line={"color": _COLOURS[1], "dash": "dash"})
        )
    figure.update_yaxes(rangemode="tozero")
    return "kNN accuracy on held-out images", _styled(figure, "top-1, %")


def _styled(figure: go.Figure, axis: str) -> go.Figure:
    grid = {"gridcolor": "rgba(138,145,158,.25)", "zeroline": False}
    return figure.update_layout(
        height=320,
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        font={"color": _GREY},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        xaxis={"title": "step", **grid},
        yaxis={"title": axis, **grid},
        legend={"orientation": "h", "y": 1.1},
    )
