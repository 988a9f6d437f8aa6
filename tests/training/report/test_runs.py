"""The page of a run: it needs no network, and shows the run's files."""

import base64
import io
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from histories import AFTER, BEFORE, CONFIG, STEPS, history
from PIL import Image

from pipelines.config import DataConfig
from training.config import TrainConfig, config_hash
from training.metrics import MetricsLog
from training.report import features, write_report
from training.report.features import FeatureSample, jpeg
from training.report.images import feature_map, neighbours
from training.report.runs import render as render_run


def _png() -> bytes:
    """A contact sheet of two images: three rows of 16 pixels with four between them."""
    out = io.BytesIO()
    Image.new("RGB", (2 * 20 - 4, 3 * 20 - 4), "red").save(out, "PNG")
    return out.getvalue()


def render(config: TrainConfig, metrics: list[dict[str, Any]], views: bytes | None) -> str:
    return render_run(history(metrics, config, views=views), 0)


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
    return _Page(render(CONFIG, [BEFORE, *STEPS, AFTER], _png()))


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


def test_plotlys_code_is_in_the_page_once() -> None:
    assert render(CONFIG, STEPS, None).count("plotly.js v") == 1


def test_what_the_user_wrote_is_shown_and_never_run(page: _Page) -> None:
    text = "\n".join(page.text)
    assert page.text.count("run-7") == 1
    assert "run-7 - diptych" in text
    assert f"SimCLR, resnet20, {CONFIG.data.train}, config {config_hash(CONFIG)}" in text
    assert "<script>alert" not in render(CONFIG, [], None)


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
    page = _Page(render(CONFIG, STEPS, None))
    assert "img" not in {tag for tag, _ in page.tags}
    assert not any("kNN" in text for text in page.text)


def test_a_run_that_has_not_started_has_a_page_too() -> None:
    assert "Config" in _Page(render(CONFIG, [], None)).text


def test_the_report_is_written_from_the_runs_files(tmp_path: Path) -> None:
    config = TrainConfig(data=DataConfig(train="somewhere"), output=str(tmp_path), name="run")
    log = MetricsLog(str(tmp_path / "run"), 0)
    log.append(**AFTER)
    log.flush()
    (tmp_path / "run/views.png").write_bytes(_png())
    metrics: list[dict[str, Any]] = [AFTER]
    uri = write_report(config)
    assert uri == str(tmp_path / "run/report.html")
    left = _Page(Path(uri).read_text(encoding="utf-8"))
    assert left.fact("kNN, trained") == "81.2%" == _Page(render(config, metrics, None)).fact("kNN, trained")


def test_quarantined_images_are_counted_by_reason_and_their_reasons_escaped() -> None:
    quarantined = Counter({"is <torn>": 3, "has no header": 1})
    page = render_run(history([], quarantined=quarantined), 0)
    text = _Page(page).text
    assert text[text.index("is <torn>") - 1] == "3"
    assert text[text.index("has no header") - 1] == "1"
    assert "<torn>" not in page


def test_a_page_of_many_steps_reasons_and_classes_stays_below_15_mb() -> None:
    steps = [{**STEPS[0], "step": step, "loss": 1 / step, "view_matching": 0.5} for step in range(1, 50_000)]
    reasons = Counter({f"is cut after {number} bytes": 1 for number in range(100_000)})
    page = render_run(history(steps, quarantined=reasons), 0)
    generator = np.random.default_rng(0)
    # Noise takes the most bytes.
    noise = generator.integers(0, 256, (features._MOST_IMAGES, 96, 96, 3), np.uint8)
    sample = FeatureSample(
        50_000,
        "held-out images",
        [jpeg(Image.fromarray(image), 96) for image in noise],
        generator.standard_normal((len(noise), 64), np.float32),
        np.arange(len(noise)) * 2,
        tuple(f"class {number}" for number in range(1000)),
    )
    images = [point.source for point in feature_map(sample).points]
    images += [cell.source for row in neighbours(sample).rows for cell in row]
    assert len(page) + sum(map(len, images)) < 15e6
