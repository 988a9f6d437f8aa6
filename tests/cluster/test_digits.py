"""The demo's images."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from cluster.cli.main import main
from cluster.digits import SIDE, scattered_digits
from pipelines.config import DataConfig
from pipelines.index import build_index


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_same_seed_gives_the_same_bytes() -> None:
    first, again, other = (list(scattered_digits(20, held_out=False, seed=seed)) for seed in (4, 4, 5))
    assert first == again
    assert first != other


def test_labels_are_those_of_the_digits_and_held_out_ones_are_every_fifth() -> None:
    target = load_digits(return_X_y=True)[1]
    held_out = [label for _, label, _ in scattered_digits(50, held_out=True, seed=0)]
    others = [label for _, label, _ in scattered_digits(50, held_out=False, seed=0)]
    assert held_out == target[::5][:50].tolist()
    assert others == np.delete(target, np.arange(0, len(target), 5))[:50].tolist()


def test_raw_pixels_say_little_of_the_digit() -> None:
    train, test = (list(scattered_digits(1000, held_out=held_out, seed=0)) for held_out in (False, True))
    x, y = ([pixels(content).ravel() for content, _, _ in rows] for rows in (train, test))
    model = KNeighborsClassifier(20).fit(x, [label for _, label, _ in train])
    assert model.score(y, [label for _, label, _ in test]) < 0.3
    assert x[0].shape == (SIDE * SIDE * 3,)


@pytest.mark.parametrize("by_class", [False, True])
def test_the_command_writes_images_that_can_be_trained_on(
    tmp_path: Path, by_class: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "digits")
    main(["data", "digits", folder, "--count", "30", *["--by-class"] * by_class])
    assert capsys.readouterr().out == f"30 images in {folder}\n"
    index = build_index(folder, DataConfig(train=folder))
    assert int(index.rows.sum()) == 30
    assert index.has_labels == by_class
    found = {path.read_bytes() for path in Path(folder).rglob("*.png")}
    assert found == {image for image, _, _ in scattered_digits(30, held_out=False, seed=0)}
    with pytest.raises(SystemExit, match="2"):
        main(["data", "digits", folder])
    assert f"{folder} exists; name a new folder" in capsys.readouterr().err
