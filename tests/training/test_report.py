"""The report: one page that needs no network and shows what the run left."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.config import DataConfig
from training.config import EncoderConfig, TrainConfig, config_hash
from training.metrics import MetricsLog
from training.report import render, write_report

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
    out = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(out, "PNG")
    return out.getvalue()


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
    assert [resource[:22] for resource in resources if resource] == ["data:image/png;base64,"]
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
    assert page.fact("epochs") == "1"
    assert page.fact("last loss") == "3.500"
    assert page.fact("images/s, median") == "3,000"


def test_the_views_are_within_the_page(page: _Page) -> None:
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 1
    assert images[0]["alt"]
    assert base64.b64decode(str(images[0]["src"]).partition(",")[2]) == _png()


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
