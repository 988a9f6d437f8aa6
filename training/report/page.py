"""Self-contained HTML pages from Jinja2 templates; the reports of runs and of searches share them."""

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

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
