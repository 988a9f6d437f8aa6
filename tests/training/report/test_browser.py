"""The pages of a small trained run, and of two compared: what is in them, and in a real browser."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from PIL import Image

from cluster.digits import scattered_digits
from pipelines import storage
from pipelines.config import DataConfig
from pipelines.index import build_index
from pipelines.reader import read_windows
from training.config import TrainConfig
from training.evaluation.evaluator import Sets
from training.gather import LocalGather
from training.process import Worker
from training.report import write_report, write_reports
from training.report.features import affordable_images
from training.report.runs import COMMAND_MULTIPLY_ADDS, END_MULTIPLY_ADDS
from training.run_folder import claim_run, read_config
from training.trainer import run_uri, train

_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEST_IMAGES, _STEPS = 60, 6

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")


def _folder(root: Path, count: int, *, held_out: bool) -> str:
    """Digits in folders that name their classes."""
    for content, label, key in scattered_digits(count, held_out=held_out, seed=0):
        path = root / _NAMES[label] / Path(key).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(root)


def _train(data: DataConfig, output: Path, name: str, **fields: Any) -> str:
    """A run in this process, and what `diptych train` keeps of it; its URI."""
    settings: dict[str, Any] = {
        "batch_size": 24, "lanes": 4, "steps": _STEPS, "temperature": 1.0, "encoder": {"name": "resnet8"},
        "projector": {"hidden_dim": 32, "dim": 16}, "evaluation": {"neighbours": 10, "every_epochs": 1},
        "optimizer": {"name": "sgd", "learning_rate": 0.01, "scaling": "none"},
    }  # fmt: skip
    config = TrainConfig(data=data, output=str(output), name=name, **{**settings, **fields})
    index = build_index(data.train, data)
    test = build_index(data.test, data) if data.test else None
    claim_run(run_uri(config), config)
    for which, listed in (("train", index), ("test", test)):
        if listed:
            storage.write(storage.join(run_uri(config), "index", f"{which}.parquet"), listed.to_bytes())
    worker = Worker(LocalGather(), torch.device("cpu"), 1, read_windows)
    train(config, Sets.of(config, index, test), worker, lambda values: None)
    return run_uri(config)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("digits")
    return DataConfig(
        train=_folder(folder / "train", 72, held_out=False),
        test=_folder(folder / "test", _TEST_IMAGES, held_out=True),
        recipe="simclr-cifar",
    )


@pytest.fixture(scope="module")
def run(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(_train(data, tmp_path_factory.mktemp("runs"), "first"))


@pytest.fixture(scope="module")
def other(data: DataConfig, run: Path) -> Path:
    return Path(_train(data, run.parent, "second", temperature=0.5, seed=1))


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return Path(write_reports([str(run)], None))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def _copy(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to / run.name))


def _headings(content: str) -> list[str]:
    return re.findall("<h2>([^<]*)</h2>", content)


def test_the_page_has_every_section_and_is_small_enough_to_send(run: Path, page: Path) -> None:
    assert page == run / "report.html"
    assert page.stat().st_size < 15e6
    content = page.read_text()
    assert _headings(content) == [
        "Not learned (yet)", "Summary", "Curves", "Images and their views", "Features", "Nearest neighbours",
        "Features without labels", "Quarantined images", "Run it again", "Versions", "Config",
    ]  # fmt: skip
    assert len(re.findall("<g data-name", content)) == _TEST_IMAGES
    assert f"{_TEST_IMAGES} test images as the encoder sees them after {_STEPS} steps" in content
    assert "t-SNE, perplexity 15, seed 0" in content
    assert set(re.findall('<g data-name="([a-z]*)"', content)) == set(_NAMES)
    assert f"diptych train {run}/config.toml --name first-again" in content
    assert torch.__version__ in content


def test_the_same_run_has_the_same_page(run: Path, page: Path, tmp_path: Path) -> None:
    again = write_reports([str(run)], str(tmp_path / "again.html"))
    assert Path(again).read_bytes() == page.read_bytes()


def test_nothing_of_the_environment_is_in_the_page(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = ("AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_KEY", "WANDB_API_KEY", "SOMETHING")
    for name in secrets:
        monkeypatch.setenv(name, f"hidden-value-of-{name.lower()}")
    content = Path(write_reports([str(run)], str(tmp_path / "page.html"))).read_text()
    assert "hidden-value" not in content


def test_a_run_without_a_checkpoint_has_all_but_the_features(run: Path, tmp_path: Path) -> None:
    young = _copy(run, tmp_path)
    shutil.rmtree(young / "checkpoints")
    content = Path(write_reports([str(young)], None)).read_text()
    assert "There is no checkpoint yet" in content
    assert "<g data-name" not in content
    assert 'id="curve-loss"' in content
    assert 'alt="Image 1"' in content


def test_a_run_that_has_only_begun_has_a_page(run: Path, tmp_path: Path) -> None:
    young = tmp_path / "first"
    young.mkdir()
    shutil.copy(run / "config.toml", young)
    content = Path(write_reports([str(young)], None)).read_text()
    for part in ("No step is logged yet", "There is no views.png yet", "There is no checkpoint yet"):
        assert part in content


def test_a_run_whose_images_are_gone_has_all_but_them(data: DataConfig, run: Path, tmp_path: Path) -> None:
    left = _copy(run, tmp_path)
    images = tmp_path / "test"
    shutil.copytree(str(data.test), images)
    index = build_index(str(images), data)
    (left / "index/test.parquet").write_bytes(index.to_bytes())
    shutil.rmtree(images)
    for _ in range(2):  # With the index that the run has kept, and without.
        content = Path(write_reports([str(left)], None)).read_text()
        note = re.search('<p class="note">The images cannot be shown: ([^<]*)</p>', content)
        assert note
        assert str(images) in note[1]
        assert 'id="curve-loss"' in content
        (left / "index/test.parquet").unlink(missing_ok=True)
        config = (left / "config.toml").read_text().replace(str(data.test), str(images))
        (left / "config.toml").write_text(re.sub("# crc32: .*\n", "", config))


def test_a_torn_checkpoint_is_said_in_the_page(run: Path, tmp_path: Path) -> None:
    torn = _copy(run, tmp_path)
    for path in (torn / "checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    content = Path(write_reports([str(torn)], None)).read_text()
    assert "The newest checkpoint cannot be read" in content
    assert 'id="curve-loss"' in content


def test_images_without_labels_and_without_a_test_set_are_shown_too(data: DataConfig, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in Path(data.train).rglob("*.png"):
        shutil.copy(path, flat)
    data = replace(data, train=str(flat), test=None)
    content = Path(write_reports([_train(data, tmp_path, "plain", steps=2)], None)).read_text()
    assert "72 training images as the encoder sees them" in content
    assert "of the same class" not in content
    assert "aria-pressed=" not in content.replace("[aria-pressed=true]", "")


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run: it has no config.toml; give OUTPUT/NAME"):
        write_reports([str(tmp_path)], None)
    with pytest.raises(ValueError, match="is named twice; name different runs"):
        write_reports([str(run), f"{run}/"], None)
    torn = _copy(run, tmp_path)
    (torn / "metrics.jsonl").write_text('{"step": 1\n')
    with pytest.raises(ValueError, match=r"first/metrics.jsonl is damaged in line 1; restore it"):
        write_reports([str(torn)], None)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write .*; choose another --output"):
        write_reports([str(run)], str(tmp_path / "file/page.html"))


def test_several_runs_are_compared(run: Path, other: Path) -> None:
    path = Path(write_reports([str(run), str(other)], None))
    assert path == run.parent / "comparison.html"
    content = path.read_text()
    differing = content[content.index("Differing settings") : content.index("<h2>Curves")]
    rows = [re.findall("<td>([^<]*)</td>", row) for row in differing.split("<tr>")[2:]]
    assert rows == [["seed", "0", "1"], ["temperature", "1.0", "0.5"]]
    for title in ("view_matching", "knn_top1", "effective_rank", "stages"):
        assert f'id="curve-{title}"' in content
    assert 'id="curve-loss"' not in content
    assert "losses of other objectives, temperatures or batch sizes cannot be compared" in content


def test_runs_of_one_name_are_told_apart_by_where_they_are(run: Path, tmp_path: Path) -> None:
    same = _copy(run, tmp_path)
    content = Path(write_reports([str(run), f"file://{same}"], str(tmp_path / "two.html"))).read_text()
    assert f"<th>{run}</th><th>file://{same}</th>" in content
    assert "the configs differ in nothing but name and output" in content


def test_the_page_at_a_runs_end_shows_the_features_where_they_cost_little(run: Path, tmp_path: Path) -> None:
    config = read_config(str(_copy(run, tmp_path)))
    content = Path(write_report(config)).read_text()
    assert len(re.findall("<g data-name", content)) == _TEST_IMAGES
    content = Path(write_report(config, 1e6)).read_text()
    assert f"With an encoder of this size this takes a while: diptych report {tmp_path}/first" in content


def test_a_larger_encoder_sees_fewer_images(data: DataConfig) -> None:
    small = TrainConfig(data=data, encoder={"name": "resnet8"})  # pyright: ignore
    for multiply_adds in (END_MULTIPLY_ADDS, COMMAND_MULTIPLY_ADDS):
        assert affordable_images(small, multiply_adds) == 500
    large = replace(small, encoder={"name": "resnet50"}, data=DataConfig(train="/images"))
    # 4.1e9 multiply-adds an image of 224 pixels a side, as torchvision says.
    assert affordable_images(large, COMMAND_MULTIPLY_ADDS) == pytest.approx(2e12 / 4.1e9, rel=0.02)
    assert affordable_images(large, END_MULTIPLY_ADDS) == 0


_PICTURES = "[...document.images].filter(image => image.src)"


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_all_of_it_without_a_network(
    browser: Browser, page: Path, width: int, dark: bool
) -> None:
    browser.open(page, width=width, dark=dark)
    assert browser.errors == []
    assert [url for url in browser.asked if not url.startswith("data:")] == [page.as_uri()[:80]]
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(f"{_PICTURES}.length") > 36
    assert browser.run(f"{_PICTURES}.every(image => image.complete && image.naturalWidth > 0)")
    plots = json.loads(
        browser.run(
            "JSON.stringify([...document.querySelectorAll('.plotly-graph-div')].map(plot => "
            "[plot.id, plot.querySelectorAll('.trace').length, plot.getBoundingClientRect().right]))"
        )
    )
    assert {name for name, _, _ in plots} == {
        f"curve-{key}"
        for key in (
            "loss", "view_matching", "learning_rate", "knn_top1", "alignment", "uniformity", "effective_rank",
            "images_per_second", "stages",
        )
    }  # fmt: skip
    assert all(traces and right <= width for _, traces, right in plots)
    shot = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("L"))
    assert (np.median(shot) < 60) == dark
    assert shot.std() > 10


@pytest.mark.slow
@needs_chromium
def test_the_pointer_enlarges_an_image_and_a_class_is_shown_alone(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280, dark=False)
    browser.run("document.querySelector('.map').scrollIntoView()")
    point = "document.querySelectorAll('.map g')[7]"
    browser.run(f"{point}.parentNode.append({point})")  # Above the others.
    x, y, name, picture = json.loads(
        browser.run(
            "(() => { const last = [...document.querySelectorAll('.map g')].at(-1), "
            "box = last.getBoundingClientRect(); return JSON.stringify([box.x + box.width / 2, box.y + "
            "box.height / 2, last.dataset.name, last.querySelector('image').getAttribute('href')]); })()"
        )
    )
    browser.move(x, y)
    assert browser.run("getComputedStyle(document.querySelector('.lens')).display") == "block"
    assert browser.run("document.querySelector('.lens b').textContent") == name
    assert browser.run("document.querySelector('.lens img').src") == picture
    browser.run("[...document.querySelectorAll('.legend button')][3].click()")
    shown = browser.run("[...document.querySelectorAll('.map g.chosen')].map(g => g.dataset.name).join(' ')")
    assert set(shown.split()) == {browser.run("document.querySelectorAll('.legend button')[3].textContent")}
    browser.run("[...document.querySelectorAll('.legend button')][3].click()")
    assert not browser.run("document.querySelector('.map').classList.contains('only')")
    assert browser.errors == []


@pytest.mark.slow
@needs_chromium
def test_a_plots_button_saves_it_as_a_png(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280, dark=True)
    browser.run("document.getElementById('curve-loss').scrollIntoView()")
    button = "document.querySelector('#curve-loss .modebar-btn')"
    x, y = json.loads(
        browser.run(
            f"(box => JSON.stringify([box.x + box.width / 2, box.y + box.height / 2]))"
            f"({button}.getBoundingClientRect())"
        )
    )
    browser.click(x, y)
    saved = browser.downloads / "curve-loss.png"
    for _ in range(600):
        if saved.exists():
            break
        browser.run("new Promise(done => setTimeout(done, 100))")
    drawn = np.asarray(Image.open(saved).convert("RGBA"))
    _, width = drawn.shape[:2]
    assert width == 2 * browser.run("document.getElementById('curve-loss').clientWidth")
    colours = {tuple(pixel) for pixel in drawn[drawn[:, :, 3] == 255][:, :3].tolist()}
    assert (0x3B, 0x82, 0xC4) in colours  # The curve's blue.
    assert browser.errors == []


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_a_comparisons_runs_over_each_other(
    browser: Browser, run: Path, other: Path, tmp_path: Path, width: int
) -> None:
    path = Path(write_reports([str(run), str(other)], str(tmp_path / "two.html")))
    browser.open(path, width=width, dark=True)
    assert browser.errors == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.querySelectorAll('#curve-learning_rate .trace').length") == 2
    drawn = browser.run(
        "document.getElementById('curve-learning_rate').data.map(trace => trace.name).join(' ')"
    )
    assert drawn == "first second"
