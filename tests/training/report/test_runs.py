"""The report: one page that needs no network and shows what the run left."""

import base64
import io
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from json import JSONDecoder
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.config import DataConfig
from training.certainty import with_margins
from training.config import EncoderConfig, TrainConfig, config_hash
from training.metrics import MetricsLog
from training.report import write_report
from training.report.curves import thinned
from training.report.history import RunHistory
from training.report.runs import render as render_run
from training.report.summary import measurements, settings

_CONFIG = TrainConfig(
    data=DataConfig(train="s3://bucket/<script>alert('1')</script>&more"),
    name="run-7",
    encoder=EncoderConfig(name="resnet20"),
)
_STEPS = [
    {
        "step": step,
        "epoch": 1,
        "loss": 6.0 - step / 2,
        "learning_rate": 0.1,
        "images_per_second": 1000.0 * step,
    }
    for step in range(1, 6)
]
_BEFORE = {"step": 0, "epoch": 0, "knn_top1": 0.30126, "knn_top1_pixels": 0.2502}
_AFTER = {"step": 5, "epoch": 1, "knn_top1": 0.81249}


def _png() -> bytes:
    """A contact sheet of two images: three rows of 16 pixels with four between them."""
    out = io.BytesIO()
    Image.new("RGB", (2 * 20 - 4, 3 * 20 - 4), "red").save(out, "PNG")
    return out.getvalue()


def render(config: TrainConfig, metrics: list[dict[str, Any]], views: bytes | None) -> str:
    return render_run(RunHistory(config, metrics, views=views), 0)


class _Page(HTMLParser):
    """The page's tags and text as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.style = ""
        self.text: list[str] = []
        self._within = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._within = tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within == "style":
            self.style += data
        elif self._within != "script":
            self.text.append(data.strip())

    def fact(self, label: str) -> str:
        """What stands above `label` among the page's facts."""
        return self.text[self.text.index(label) - 1]


@pytest.fixture(scope="module")
def page() -> _Page:
    return _Page(render(_CONFIG, [_BEFORE, *_STEPS, _AFTER], _png()))


def test_the_page_loads_nothing(page: _Page) -> None:
    resources = [
        attributes[name]
        for _, attributes in page.tags
        for name in ("src", "href", "srcset", "data")
        if name in attributes
    ]
    assert {resource[:23] for resource in resources if resource} == {"data:image/jpeg;base64,"}
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert "url(" not in page.style
    assert "@import" not in page.style


def test_the_pictures_code_is_in_the_page_once() -> None:
    assert render(_CONFIG, _STEPS, None).count("plotly.js v") == 1


def test_what_the_user_wrote_is_shown_and_never_run(page: _Page) -> None:
    text = "\n".join(page.text)
    assert page.text.count("run-7") == 1
    assert "run-7 - diptych" in text
    assert f"SimCLR, resnet20, {_CONFIG.data.train}, config {config_hash(_CONFIG)}" in text
    assert "<script>alert" not in render(_CONFIG, [], None)


def test_accuracies_are_shown_as_percentages(page: _Page) -> None:
    assert page.fact("kNN, raw pixels") == "25.0%"
    assert page.fact("kNN, untrained") == "30.1%"
    assert page.fact("kNN, trained") == "81.2%"


def test_the_last_step_and_the_median_speed_are_shown(page: _Page) -> None:
    assert page.fact("steps") == "5"
    assert page.fact("epochs") == "1 of 100"
    assert page.fact("last loss") == "3.500"
    assert page.fact("images/s, median") == "3,000"


def test_the_views_are_within_the_page(page: _Page) -> None:
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    whats = ("Image", "First view of image", "Second view of image")
    assert [image["alt"] for image in images] == [f"{what} {number}" for number in (1, 2) for what in whats]
    for image in images:
        tile = Image.open(io.BytesIO(base64.b64decode(str(image["src"]).partition(",")[2])))
        assert tile.size == (16, 16)
        red, green, blue = tile.resize((1, 1)).getpixel((0, 0))  # pyright: ignore
        assert red > 250
        assert green + blue < 10


def test_a_run_without_evaluation_or_views_has_a_page_too() -> None:
    page = _Page(render(_CONFIG, _STEPS, None))
    assert "img" not in {tag for tag, _ in page.tags}
    assert not any("kNN" in text for text in page.text)


def test_a_run_that_has_not_begun_has_a_page_too() -> None:
    assert "Config" in _Page(render(_CONFIG, [], None)).text


def test_the_report_is_written_from_what_the_run_left(tmp_path: Path) -> None:
    config = TrainConfig(data=DataConfig(train="somewhere"), output=str(tmp_path), name="run")
    log = MetricsLog(str(tmp_path / "run"), 0)
    log.append(**_AFTER)
    log.flush()
    (tmp_path / "run/views.png").write_bytes(_png())
    metrics: list[dict[str, Any]] = [_AFTER]
    uri = write_report(config)
    assert uri == str(tmp_path / "run/report.html")
    left = _Page(Path(uri).read_text(encoding="utf-8"))
    assert left.fact("kNN, trained") == "81.2%" == _Page(render(config, metrics, None)).fact("kNN, trained")


def test_what_went_wrong_is_counted_and_nothing_is_said_where_nothing_did(page: _Page) -> None:
    bad = [
        {"step": 2, "epoch": 1, "skipped": 1},
        {"step": 3, "epoch": 1, "skipped": 2},
        {"step": 3, "epoch": 1, "rolled_back_to": 1},
        {"step": 3, "epoch": 1, "quarantined": 1234},
    ]
    wrong = _Page(render(_CONFIG, [*_STEPS[:1], *bad, *_STEPS[3:]], None))
    assert wrong.fact("steps skipped") == "2"
    assert wrong.fact("rollbacks") == "1"
    assert wrong.fact("images quarantined") == "1,234"
    assert not {"steps skipped", "rollbacks", "images quarantined"} & set(page.text)


def test_the_time_that_steps_took_is_their_images_by_their_speed(page: _Page) -> None:
    # 256 images at 1,000 to 5,000 a second.
    assert page.fact("time in steps") == "1 s"
    slow = [{**line, "images_per_second": 0.05} for line in _STEPS]
    assert _Page(render(_CONFIG, slow, None)).fact("time in steps") == "7.1 h"


def test_left_out_images_are_counted_by_reason_and_their_reasons_escaped() -> None:
    left_out = Counter({"is <torn>": 3, "has no header": 1})
    page = render_run(RunHistory(_CONFIG, [], quarantined=left_out), 0)
    text = _Page(page).text
    assert text[text.index("is <torn>") + 1] == "3"
    assert text[text.index("has no header") + 1] == "1"
    assert "<torn>" not in page


def test_view_matching_is_shown_beside_its_chance() -> None:
    steps = [{**line, "view_matching": 0.1 * line["step"]} for line in _STEPS]
    run = RunHistory(replace(_CONFIG, batch_size=10), steps)
    assert dict(measurements(run))["views matched"] == "30.0% (chance 5.3%)"
    assert "views matched" not in dict(measurements(RunHistory(_CONFIG, _STEPS)))
    content = render_run(run, 0)
    assert _Page(content).text.count("View matching") == 1
    drawn = content[content.index("Plotly.newPlot", content.index('id="curve-view_matching"')) :]
    traces, _ = JSONDecoder().raw_decode(drawn[drawn.index("[") :])
    assert [trace["name"] for trace in traces] == ["run-7", "chance"]
    # 10 images are 20 views, and each has 19 others.
    assert traces[1]["y"] == pytest.approx([100 / 19] * 2)
    assert "View matching" not in _Page(render_run(RunHistory(_CONFIG, _STEPS), 0)).text


def test_many_steps_are_drawn_as_means_of_equally_many() -> None:
    values = np.stack([np.arange(1001), 3.0 * np.arange(1001)], axis=1)
    rows, size = thinned(values, 100)
    assert size == 11
    assert len(rows) == 91
    np.testing.assert_allclose(rows[:, 1], 3 * rows[:, 0])
    np.testing.assert_allclose(rows[0], values[:11].mean(0))
    np.testing.assert_allclose(rows[-1], values[990:].mean(0))
    few, size = thinned(values[:5], 100)
    assert size == 1
    np.testing.assert_array_equal(few, values[:5])


def test_a_run_that_went_on_says_on_how_many_workers() -> None:
    begun = [{"step": 0, "epoch": 0, "workers": 4}, {"step": 20, "epoch": 1, "workers": 4}]
    facts = dict(settings(RunHistory(_CONFIG, begun)) + measurements(RunHistory(_CONFIG, begun)))
    assert (facts["workers"], facts["resumes"]) == ("4", "1")
    fewer = RunHistory(_CONFIG, [*begun, {"step": 40, "epoch": 2, "workers": 1}])
    assert dict(settings(fewer))["workers"] == "4, then 1"
    assert "resumes" not in dict(measurements(RunHistory(_CONFIG, begun[:1])))


def test_accuracies_say_how_sure_they_are_and_what_to_compare_them_with() -> None:
    compared = {
        "evaluated_images": 172, "majority_share": 0.35, "chance": 1 / 3, "bank_images": 1500,
        "neighbours": 12, "trained_on_images": 4,
    }  # fmt: skip
    line = {"step": 5, "epoch": 1, **with_margins({"knn_top1": 0.35}, 172), **compared}
    shown = dict(measurements(RunHistory(_CONFIG, [*_STEPS, line])))
    assert shown["kNN, trained"] == "35.0% ± 7.4"
    assert (shown["images evaluated"], shown["largest class"], shown["chance"]) == ("172", "35.0%", "33.3%")
    assert (shown["training images compared with"], shown["neighbours"]) == ("1,500", "12")
    assert shown["evaluated and trained on"] == "4"
