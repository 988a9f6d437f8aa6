"""Templates: what they escape, what they refuse, and that they come with the package."""

from importlib.resources import files
from pathlib import Path

import jinja2
import pytest
from hatchling.builders.wheel import WheelBuilder

from training.report.page import page, render_template

ROOT = Path(__file__).parents[3]


def test_text_is_escaped_and_html_and_css_are_not() -> None:
    content = page(
        "<x-1>", "<x-2>", [("<x-3>", "<x-4>")], "<p>body</p>", 'name = "<x-5>"', ".x > .y { color: red }"
    )
    for number in range(1, 6):
        assert f"<x-{number}>" not in content
        assert f"&lt;x-{number}&gt;" in content
    assert "<p>body</p>" in content
    assert ".x > .y { color: red }" in content


def test_a_path_may_be_broken_between_its_parts_and_is_escaped_all_the_same() -> None:
    shared = {"name": "", "subtitle": "", "facts": [], "config": "", "run_colours": [], "plotly_script": ""}
    rows = [["data.train", "s3://bucket/<folder>/1.5"]]
    content = render_template(
        "comparison.html",
        **shared, names=["one"], summary=rows, differences=[], curves=[], feature_curves=[], first_run="",
        versions=[],
    )  # fmt: skip
    assert "<td>data.<wbr>train</td><td>s3://<wbr>bucket/&lt;folder&gt;/1.5</td>" in content


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="'subtitle' is undefined"):
        render_template("page.html", name="a", facts=[], body="", config="")


def test_a_wheel_has_the_templates() -> None:
    packed = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    templates = {
        f"training/report/templates/{file.name}"
        for file in files("training.report").joinpath("templates").iterdir()
    }
    assert "training/report/templates/page.html" in templates
    assert templates <= packed
