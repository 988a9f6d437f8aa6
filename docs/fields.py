"""The Sphinx directives `fields` and `recipes`: what can be set, out of the config classes' docstrings."""

import json
from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields, is_dataclass
from importlib import import_module
from typing import Annotated, Any, ClassVar

from docutils import nodes
from docutils.statemachine import StringList
from pydantic import TypeAdapter
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from cluster.cli.main import app as command_line
from pipelines.config import RECIPES

# The command that has the flags of a kind of key.
_COMMANDS = {"key": "train", "search-key": "tune"}


class Fields(SphinxDirective):
    """`{fields} MODULE:CLASS [TABLE]`: each field, its type, default, flag and docstring.

    `TABLE` is where the class stands in the TOML file, such as `data.view`.
    """

    required_arguments, optional_arguments = 1, 1
    option_spec: ClassVar[dict[str, Any]] = {"search": lambda _: True}

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].partition(":")
        table = f"{self.arguments[1]}." if len(self.arguments) > 1 else ""
        kind = "search-key" if "search" in self.options else "key"
        self.env.note_dependency(import_module(module).__file__)
        lines = [
            line for entry in entries(getattr(import_module(module), name), table, kind) for line in entry
        ]
        return parsed(self, lines)


class Recipes(SphinxDirective):
    """`{recipes}`: the fields in which the named recipes differ, of the first and of the second view."""

    def run(self) -> list[nodes.Node]:
        return parsed(self, recipe_table())


def entries(cls: type, table: str, kind: str) -> Iterator[list[str]]:
    """The Markdown of each field that is no table of its own."""
    flags = _flags(_COMMANDS[kind])
    for field in fields(cls):
        known = cls.__pydantic_fields__[field.name]
        if is_dataclass(known.annotation):
            continue
        key = table + field.name
        flag = "--" + key.replace("_", "-")
        facts = [words(known.annotation, known.metadata), _default(field)]
        facts += [f"`{name}`" for name in flags if name == flag or name == _off(flag)]
        text = (known.description or "").splitlines()
        yield [f":::{{{kind}}} {key}", " · ".join(facts), "", *text, ":::", ""]


def words(annotation: Any, metadata: list[Any]) -> str:
    """What a field takes, in words."""
    constraints = [part for part in metadata if not _is_check(part)]
    of = Annotated[annotation, *constraints] if constraints else annotation
    return _said(TypeAdapter(of).json_schema())


def recipe_table() -> list[str]:
    """A row for each field of a view in which the recipes differ."""
    views = [
        (name, number, asdict(view)) for name, pair in RECIPES.items() for number, view in enumerate(pair)
    ]
    columns = [
        (name if RECIPES[name][0] == RECIPES[name][1] else f"{name}, {('first', 'second')[number]}", view)
        for name, number, view in views
        if not (number and RECIPES[name][0] == RECIPES[name][1])
    ]
    rows = ["| | " + " | ".join(name for name, _ in columns) + " |", "|---|" + "---|" * len(columns)]
    for field in columns[0][1]:
        values = [view[field] for _, view in columns]
        if len({repr(value) for value in values}) > 1:
            rows.append(f"| {{key}}`data.view.{field}` | " + " | ".join(map(_toml, values)) + " |")
    return rows


def _is_check(part: Any) -> bool:
    """Checks by a function say nothing of themselves; the docstring does."""
    return type(part).__name__.endswith("Validator")


def _said(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_said(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema:
        return _either([f"`{_toml(value)}`" for value in schema["enum"]])
    if "const" in schema:
        return f"`{_toml(schema['const'])}`"
    match schema["type"]:
        case "array" if "prefixItems" in schema:
            return f"{len(schema['prefixItems'])} {_plural(schema['prefixItems'][0])}"
        case "array":
            return f"a list of {_plural(schema['items'])}"
        case "integer" | "number" as kind:
            return ("whole number" if kind == "integer" else "number") + _bounds(schema)
        case kind:
            return {"string": "text", "boolean": "true or false", "object": "table"}[kind]


def _plural(schema: dict[str, Any]) -> str:
    said = _said(schema)
    return said.replace("number", "numbers", 1)


def _bounds(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    said = f" from {low:g}" if low is not None else f" above {above:g}" if above is not None else ""
    if high is not None:
        return f"{said} to {high:g}" if low is not None else f"{said}, at most {high:g}"
    if below is not None and below >= 2**32:
        return f"{said}, below 2{'⁶³' if below == 2**63 else '³²'}"
    return f"{said}, below {below:g}" if below is not None else said


def _either(options: list[str]) -> str:
    return " or ".join([", ".join(options[:-1]), options[-1]]) if len(options) > 1 else options[0]


def _default(field: Any) -> str:
    if field.default_factory is not MISSING:
        return "unset"
    if field.default is MISSING:
        return "required"
    return "unset" if field.default is None else f"default `{_toml(field.default)}`"


def _toml(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return f"{value:.3g}" if "e" not in repr(value) else repr(value)
    return json.dumps(value)


def _flags(command: str) -> list[str]:
    arguments = command_line[command].assemble_argument_collection()
    return [name for argument in arguments if argument.show for name in argument.names]


def _off(flag: str) -> str:
    *tables, last = flag.removeprefix("--").split(".")
    return "--" + ".".join([*tables, f"no-{last}"])


def parsed(directive: SphinxDirective, lines: list[str]) -> list[nodes.Node]:
    """The nodes of some lines of Markdown."""
    holder = nodes.Element()
    directive.state.nested_parse(StringList(lines, source=directive.get_source_info()[0]), 0, holder)
    return holder.children


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives, and the roles `key` and `search-key` that link to a field."""
    app.add_object_type("key", "key", objname="config key")
    app.add_object_type("search-key", "search-key", objname="key of a search")
    app.add_directive("fields", Fields)
    app.add_directive("recipes", Recipes)
    return {"parallel_read_safe": True}
