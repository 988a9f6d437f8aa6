"""The page of a report, from a template, and the look of its plots."""

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

# Where a path or a dotted key may be broken.
_JOINT = re.compile("(?<=[/._])(?=[A-Za-z])")


def render_template(template: str, **values: Any) -> str:
    """A page, or a part of one, from a file of templates/, with `values` escaped.

    Raises jinja2.UndefinedError if the template names a value that is missing.
    """
    return _environment().get_template(template).render(values)


def page(
    name: str, subtitle: str, facts: Iterable[tuple[str, str]], body: str, config: str, style: str = ""
) -> str:
    """A page of a heading, facts (label, value), and a config as TOML.

    `body` is HTML and `style` CSS, both trusted: they are not escaped.
    """
    return render_template(
        "page.html", name=name, subtitle=subtitle, facts=facts, body=body, config=config, style=style
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("training.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["parts"] = _JOINT.split
    return environment


# Readable on a light page and on a dark one.
GREY = "#8a919e"
COLOURS = (
    "#3b82c4", "#d9822b", "#3a9e6b", "#c9504c", "#8f6fc9", "#a07a55", "#d46fae", "#7f8794", "#a8a134",
    "#2fa5b5",
)  # fmt: skip

_GRID: dict[str, Any] = {"gridcolor": "rgba(138,145,158,.25)", "zeroline": False, "automargin": True}


def colour(number: int) -> str:
    """One of the colours for the first ten numbers; later ones get hues that are far apart."""
    return COLOURS[number] if number < len(COLOURS) else f"hsl({number * 137.508 % 360:.0f} 60% 52%)"


def plotly_script() -> str:
    """Plotly's JavaScript as HTML, about 5 MB; a page with plots needs it once, ahead of them."""
    return render_template("plotly.html", code=get_plotlyjs())


def plot_html(figure: go.Figure, name: str) -> str:
    """A figure as HTML. Its one button saves NAME.png, on a transparent ground at twice the size.

    name: the id within the page; without one the page would differ each time.
    """
    config = {
        "responsive": True,
        "displaylogo": False,
        "displayModeBar": True,
        "modeBarButtons": [["toImage"]],
        "toImageButtonOptions": {"format": "png", "filename": name, "scale": 2},
    }
    return figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)


def styled(figure: go.Figure, x_title: str, y_title: str) -> go.Figure:
    """The figure with the page's font, grid and size."""
    return figure.update_layout(
        template="none",
        height=270,
        margin={"l": 52, "r": 12, "t": 24, "b": 40},
        font={"color": GREY, "family": "system-ui, sans-serif", "size": 12},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": COLOURS[0]},
        xaxis={"title": {"text": x_title, "standoff": 6, "font": {"size": 12}}, **_GRID},
        yaxis={"title": {"text": y_title, "standoff": 6, "font": {"size": 12}}, **_GRID},
        showlegend=False,
        hovermode="x unified",
        hoverlabel={"bgcolor": "#22262d", "font": {"color": "#e6e8eb"}, "bordercolor": "#22262d"},
    )
