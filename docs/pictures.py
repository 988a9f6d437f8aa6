"""The pictures of docs/concepts.md, each for a light and a dark page, drawn by diptych's own plan and draws.

python docs/pictures.py

"""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from cluster.digits import scattered_digits
from pipelines.dali import Request, make_views
from pipelines.draws import Draws, draw
from pipelines.plan import Plan, lanes_of
from pipelines.recipes import ViewRecipe

_FOLDER = Path(__file__).parent / "pictures"


@dataclass(frozen=True)
class Palette:
    """Colours of text and lines, of what is behind, and of four lanes or workers."""

    name: str
    ink: str
    soft: str
    faint: str
    four: tuple[str, ...] = ("#4c8dd6", "#e08a2e", "#3fa66b", "#b565c4")


_PALETTES = (
    Palette("light", ink="#1c1e21", soft="#6b7280", faint="#e5e7eb"),
    Palette("dark", ink="#e6e6e6", soft="#9aa3af", faint="#30363d"),
)


# Lanes


def lanes(palette: Palette) -> Figure:
    """24 images in 4 fragments, 4 lanes, batches of 8: an epoch's line, its lanes, and who serves them."""
    rows = np.array([8, 5, 7, 4])
    plan = Plan(rows, seed=0, lanes=4, batch_size=8, window_rows=6)
    figure, axes = _canvas(8.6, 5.1)
    _heading(axes, 0, "the shards of an epoch, in random order, laid end to end", palette.ink)
    windows = [next(plan.windows(range(lane, lane + 1), 0, 3)) for lane in range(4)]
    start = 0
    for fragment in dict.fromkeys(piece.fragment for window in windows for piece in window.pieces):
        _box(axes, start, 0.35, rows[fragment], 0.7, f"shard {fragment}", palette.faint, palette.ink)
        start += rows[fragment]
    _heading(axes, 1.75, "cut into 4 lanes of 6 images, each shuffled", palette.ink)
    order = {}
    for lane, window in enumerate(windows):
        order[lane] = [lane * 6 + row for row in window.order()]
        for at, image in enumerate(order[lane]):
            _box(axes, lane * 6 + at, 2.1, 1, 0.7, str(image), palette.four[lane])
        axes.text(lane * 6 + 3, 3.05, f"lane {lane}", ha="center", va="center", color=palette.soft, size=9)
    _heading(
        axes, 3.75, "the first step: the next two images of every lane; a frame is a worker", palette.ink
    )
    for row, workers in enumerate((1, 2, 4)):
        y = 4.15 + row * 1.0
        label = f"{workers} worker" + ("s" if workers > 1 else "")
        axes.text(0, y + 0.35, label, va="center", color=palette.ink, size=10)
        for rank in range(workers):
            served = lanes_of(rank, workers, 4)
            width = len(served) * 2 * 1.1
            left = 4 + rank * (width + 0.6)
            axes.add_patch(
                Rectangle(
                    (left - 0.12, y - 0.1), width + 0.24, 0.9, facecolor="none", edgecolor=palette.soft, lw=1
                )
            )
            for number, lane in enumerate(served):
                for at, image in enumerate(order[lane][:2]):
                    x = left + (number * 2 + at) * 1.1
                    _box(axes, x, y, 1.1, 0.7, str(image), palette.four[lane])
    axes.set_xlim(-0.3, 24.3)
    axes.set_ylim(7.2, -0.3)
    return figure


# Draws


def draws(palette: Palette) -> Figure:
    """One image, and its two views in two epochs, with the numbers that they were made with."""
    recipe = ViewRecipe(size=32, blur=0.0, grey=0.3, crop_scale=(0.3, 1.0))
    (content, _, _), *_ = scattered_digits(1, held_out=False, seed=4)
    figure, axes = _canvas(8.6, 3.3)
    _picture(axes, np.asarray(Image.open(BytesIO(content))), 0, 2.05, 3.2)
    axes.text(1.6, 5.6, "image 7", ha="center", va="center", color=palette.ink, size=10)
    for row, (epoch, view) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        y = 0.45 + row * 1.85
        drawn, pixels = _made(content, recipe, epoch=epoch, view=view)
        axes.annotate(
            "", (4.5, y + 0.75), (3.5, 3.65), arrowprops={"arrowstyle": "-", "color": palette.soft, "lw": 0.8}
        )
        key = f"seed 0, epoch {epoch}, image 7, view {view}"
        colour = palette.four[2 * (epoch == 1) + view]
        axes.text(4.7, y + 0.45, key, va="center", color=colour, size=10, weight="bold")
        axes.text(4.7, y + 1.1, _told(drawn), va="center", color=palette.ink, size=9)
        _picture(axes, pixels, 18, y - 0.05, 1.7)
        axes.annotate(
            "",
            (17.7, y + 0.75),
            (16.7, y + 0.75),
            arrowprops={"arrowstyle": "->", "color": palette.soft, "lw": 1},
        )
    axes.set_xlim(-0.2, 20.2)
    axes.set_ylim(7.8, 0.2)
    axes.set_aspect("equal")
    return figure


def _made(content: bytes, recipe: ViewRecipe, *, epoch: int, view: int) -> tuple[Draws, np.ndarray]:
    """What is drawn for a view of image 7, and the view, as DALI makes it."""
    drawn = draw(recipe, seed=0, epoch=epoch, view=view, samples=np.array([7]), sizes=np.array([[32, 32]]))
    request = Request([np.frombuffer(content, np.uint8)], (drawn, drawn))
    (made, _), _ = next(make_views(iter([request]), (recipe, recipe), batch_size=1, threads=1))
    pixels = made[0].numpy().transpose(1, 2, 0) * recipe.std + recipe.mean
    return drawn, (pixels.clip(0, 1) * 255).round().astype(np.uint8)


def _told(drawn: Draws) -> str:
    top, left, height, width = drawn.box[0]
    said = [f"crop {height} x {width} at ({top}, {left})", "flipped" if drawn.flip[0] else "not flipped"]
    brightness, contrast, saturation, hue = drawn.factors[0]
    if drawn.jitter[0]:
        said.append(f"jitter {brightness:.2f}, {contrast:.2f}, {saturation:.2f}, hue {hue:+.2f}")
    else:
        said.append("no jitter")
    return ", ".join(said + ["grey"] * bool(drawn.grey[0]))


# The loss


def loss(palette: Palette) -> Figure:
    """The similarities of four images' projections on two workers: the positives, and who scores what."""
    figure, axes = _canvas(8.6, 4.2)
    names = [f"{image}{view}" for images in ("AB", "CD") for view in (1, 2) for image in images]
    for row, one in enumerate(names):
        worker = row // 4
        for column, other in enumerate(names):
            if row == column:
                face, text = "none", ""
            elif one[0] == other[0]:
                face, text = palette.four[2], "+"
            else:
                face, text = palette.four[worker] + "55", ""
            axes.add_patch(
                Rectangle((column, row), 0.94, 0.94, facecolor=face, edgecolor=palette.faint, lw=0.8)
            )
            axes.text(column + 0.47, row + 0.49, text, ha="center", va="center", color="white", weight="bold")
            if row == column:
                axes.plot([column + 0.2, column + 0.74], [row + 0.74, row + 0.2], color=palette.soft, lw=0.8)
        axes.text(row + 0.47, -0.4, _subscripted(one), ha="center", va="center", color=palette.ink, size=10)
        axes.text(-0.25, row + 0.47, _subscripted(one), ha="right", va="center", color=palette.ink, size=10)
    for worker in range(2):
        axes.add_patch(
            Rectangle(
                (-0.04, worker * 4 - 0.03), 8.02, 3.98, facecolor="none", edgecolor=palette.four[worker], lw=2
            )
        )
        label = f"worker {worker}\nscores its rows"
        axes.text(-1.1, worker * 4 + 2, label, ha="right", va="center", color=palette.four[worker], size=10)
    axes.text(4, -1.15, "the gathered projections of all workers", ha="center", color=palette.soft, size=10)
    legend = (
        (palette.four[2], "+", "the other view of the same image:\nthe similarity that should grow"),
        (palette.four[0] + "55", "", "a negative, of this worker\nor of another"),
        ("none", "/", "a projection with itself: left out"),
    )
    for at, (face, text, says) in enumerate(legend):
        y = 1.6 + at * 1.7
        axes.add_patch(Rectangle((9, y), 0.94, 0.94, facecolor=face, edgecolor=palette.faint, lw=0.8))
        colour = "white" if text == "+" else palette.soft
        axes.text(9.47, y + 0.49, text, ha="center", va="center", color=colour, weight="bold")
        axes.text(10.3, y + 0.47, says, va="center", color=palette.ink, size=10)
    axes.set_xlim(-4.2, 16.4)
    axes.set_ylim(8.1, -1.75)
    axes.set_aspect("equal")
    return figure


def _subscripted(name: str) -> str:
    """An image's letter with its view as a subscript."""
    return f"${name[0]}_{name[1]}$"


# All of them


def _canvas(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    return figure, axes


def _heading(axes: Any, y: float, text: str, ink: str) -> None:
    axes.text(0, y, text, va="center", color=ink, size=10, weight="bold")


def _box(
    axes: Any, x: float, y: float, width: float, height: float, text: str, face: str, ink: str = "white"
) -> None:
    axes.add_patch(Rectangle((x + 0.04, y), width - 0.08, height, facecolor=face, edgecolor="none"))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink, size=9)


def _picture(axes: Any, pixels: np.ndarray, x: float, y: float, side: float) -> None:
    axes.imshow(pixels, extent=(x, x + side, y + side, y), interpolation="nearest")


def write(name: str, drawn: Callable[[Palette], Figure]) -> None:
    """NAME-light.svg and NAME-dark.svg; the same bytes each time."""
    for palette in _PALETTES:
        drawn(palette).savefig(
            _FOLDER / f"{name}-{palette.name}.svg", transparent=True, metadata={"Date": None}
        )


def main() -> None:
    """Draw them all."""
    mpl.rcParams |= {"svg.hashsalt": "diptych", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
    _FOLDER.mkdir(exist_ok=True)
    for picture in (lanes, draws, loss):
        write(picture.__name__, picture)


if __name__ == "__main__":
    main()
