"""The pictures of docs/concepts.md, each for a light and a dark page, drawn by diptych's own plan and draws.

python docs/pictures.py

"""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from cluster.digits import scattered_digits
from pipelines.augment.dali import Request, make_views
from pipelines.augment.draws import Draws, draw
from pipelines.config import ViewRecipe
from pipelines.plan import Plan, lanes_of

_DOCS = Path(__file__).parent
_FOLDER = _DOCS / "pictures"


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


class Canvas:
    """Shapes on a page of width x height points; `left`, `top`, `right` and `bottom` are its coordinates."""

    def __init__(
        self, width: int, height: int, *, left: float, top: float, right: float, bottom: float
    ) -> None:
        self._size, self._left, self._top = (width, height), left, top
        self._scale = np.array([width / (right - left), height / (bottom - top)])
        self._shapes: list[dict[str, Any]] = []

    def box(
        self, x: float, y: float, width: float, height: float, *,
        fill: str = "none", opacity: float = 1, stroke: str = "none", stroke_width: float = 1,
    ) -> None:  # fmt: skip
        """A rectangle; x, y are its upper left corner."""
        look = {"fill": fill, "opacity": opacity, "stroke": stroke, "stroke_width": stroke_width}
        self._add("box", x, y, **self._extent(width, height), **look)

    def text(
        self, x: float, y: float, text: str, colour: str, *,
        size: float = 10, anchor: str = "middle", bold: bool = False, subscript: str = "",
    ) -> None:  # fmt: skip
        """Lines of text, centred at y."""
        lines = text.split("\n")
        for number, line in enumerate(lines):
            shift = (number - (len(lines) - 1) / 2) * 1.3 * size / self._scale[1]
            look = {"colour": colour, "size": size, "anchor": anchor, "bold": bold, "subscript": subscript}
            self._add("text", x, y + shift, text=line, **look)

    def line(self, x: float, y: float, to_x: float, to_y: float, colour: str) -> None:
        """A thin line."""
        to_x, to_y = self._place(to_x, to_y)
        self._add("line", x, y, to_x=to_x, to_y=to_y, colour=colour)

    def image(self, x: float, y: float, side: float, pixels: np.ndarray) -> None:
        """A square image; x, y are its upper left corner."""
        out = BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        source = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
        self._add("image", x, y, **self._extent(side, side), source=source)

    def svg(self) -> str:
        """The picture."""
        environment = Environment(
            loader=FileSystemLoader(_DOCS), autoescape=True, undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        width, height = self._size
        template = environment.get_template("picture.svg.jinja")
        return template.render(width=width, height=height, shapes=self._shapes)

    def _add(self, kind: str, x: float, y: float, **values: Any) -> None:
        x, y = self._place(x, y)
        self._shapes.append({"kind": kind, "x": x, "y": y, **values})

    def _place(self, x: float, y: float) -> list[float]:
        return ((np.array([x, y]) - (self._left, self._top)) * self._scale).round(2).tolist()

    def _extent(self, width: float, height: float) -> dict[str, float]:
        width, height = (np.array([width, height]) * self._scale).round(2).tolist()
        return {"width": width, "height": height}


# Lanes


def lanes(palette: Palette) -> Canvas:
    """24 images in 4 fragments, 4 lanes, batches of 8: an epoch's line, its lanes, and who serves them."""
    rows = np.array([8, 5, 7, 4])
    plan = Plan(rows, seed=0, lanes=4, batch_size=8, window_rows=6)
    canvas = Canvas(620, 368, left=-0.3, top=-0.3, right=24.3, bottom=7.2)
    _heading(canvas, 0, "the shards of an epoch, in random order, laid end to end", palette.ink)
    windows = [next(plan.windows(range(lane, lane + 1), 0, 3)) for lane in range(4)]
    start = 0
    for fragment in dict.fromkeys(piece.fragment for window in windows for piece in window.pieces):
        _box(canvas, start, 0.35, rows[fragment], f"shard {fragment}", palette.faint, palette.ink)
        start += rows[fragment]
    _heading(canvas, 1.75, "cut into 4 lanes of 6 images, each shuffled", palette.ink)
    order = [[lane * 6 + row for row in window.order()] for lane, window in enumerate(windows)]
    for lane, images in enumerate(order):
        for at, image in enumerate(images):
            _box(canvas, lane * 6 + at, 2.1, 1, str(image), palette.four[lane])
        canvas.text(lane * 6 + 3, 3.05, f"lane {lane}", palette.soft, size=9)
    _heading(
        canvas, 3.75, "the first step: the next two images of every lane; a frame is a worker", palette.ink
    )
    for row, workers in enumerate((1, 2, 4)):
        _workers(canvas, palette, order, workers, 4.15 + row)
    return canvas


def _workers(canvas: Canvas, palette: Palette, order: list[list[int]], workers: int, y: float) -> None:
    """A row: the first step's images in frames, one for each of so many workers."""
    label = f"{workers} worker" + ("s" if workers > 1 else "")
    canvas.text(0, y + 0.35, label, palette.ink, anchor="start")
    for rank in range(workers):
        served = lanes_of(rank, workers, 4)
        width = len(served) * 2 * 1.1
        left = 4 + rank * (width + 0.6)
        canvas.box(left - 0.12, y - 0.1, width + 0.24, 0.9, stroke=palette.soft)
        for number, lane in enumerate(served):
            for at, image in enumerate(order[lane][:2]):
                _box(canvas, left + (number * 2 + at) * 1.1, y, 1.1, str(image), palette.four[lane])


# Draws


def draws(palette: Palette) -> Canvas:
    """One image, and its two views in two epochs, with the numbers that they were made with."""
    recipe = ViewRecipe(size=32, blur=0.0, grey=0.3, crop_scale=(0.3, 1.0))
    (content, _, _), *_ = scattered_digits(1, held_out=False, seed=4)
    canvas = Canvas(620, 231, left=-0.2, top=0.2, right=20.2, bottom=7.8)
    canvas.image(0, 2.05, 3.2, np.asarray(Image.open(BytesIO(content))))
    canvas.text(1.6, 5.6, "image 7", palette.ink)
    for row, (epoch, view) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        y = 0.45 + row * 1.85
        drawn, pixels = _made(content, recipe, epoch=epoch, view=view)
        canvas.line(3.5, 3.65, 4.5, y + 0.75, palette.soft)
        key = f"seed 0, epoch {epoch}, image 7, view {view}"
        canvas.text(4.7, y + 0.45, key, palette.four[2 * (epoch == 1) + view], anchor="start", bold=True)
        canvas.text(4.7, y + 1.1, _told(drawn), palette.ink, size=9, anchor="start")
        canvas.line(17, y + 0.75, 17.7, y + 0.75, palette.soft)
        canvas.image(18, y - 0.05, 1.7, pixels)
    return canvas


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


def loss(palette: Palette) -> Canvas:
    """The similarities of four images' projections on two workers: the positives, and who scores what."""
    canvas = Canvas(620, 302, left=-4.2, top=-1.75, right=16.4, bottom=8.1)
    names = [f"{image}{view}" for images in ("AB", "CD") for view in (1, 2) for image in images]
    for row, (image, view) in enumerate(names):
        for column, (other, _) in enumerate(names):
            kind = "self" if row == column else "positive" if image == other else "negative"
            _similarity(canvas, palette, column, row, kind, worker=row // 4)
        canvas.text(row + 0.47, -0.4, image, palette.ink, subscript=view)
        canvas.text(-0.25, row + 0.47, image, palette.ink, anchor="end", subscript=view)
    for worker in range(2):
        colour = palette.four[worker]
        canvas.box(-0.04, worker * 4 - 0.03, 8.02, 3.98, stroke=colour, stroke_width=2)
        canvas.text(-1.1, worker * 4 + 2, f"worker {worker}\nscores its rows", colour, anchor="end")
    canvas.text(4, -1.15, "the gathered projections of all workers", palette.soft)
    legend = (
        ("positive", "the other view of the same image:\nthe similarity that should grow"),
        ("negative", "a negative, of this worker\nor of another"),
        ("self", "a projection with itself: excluded"),
    )
    for at, (kind, text) in enumerate(legend):
        y = 1.6 + at * 1.7
        _similarity(canvas, palette, 9, y, kind)
        canvas.text(10.3, y + 0.47, text, palette.ink, anchor="start")
    return canvas


def _similarity(canvas: Canvas, palette: Palette, x: float, y: float, kind: str, worker: int = 0) -> None:
    """A cell of the matrix: of a positive, of a negative that `worker` scores, or crossed out."""
    fill, opacity = {
        "positive": (palette.four[2], 1), "negative": (palette.four[worker], 1 / 3), "self": ("none", 1),
    }[kind]  # fmt: skip
    canvas.box(x, y, 0.94, 0.94, fill=fill, opacity=opacity, stroke=palette.faint, stroke_width=0.8)
    if kind == "positive":
        canvas.text(x + 0.47, y + 0.47, "+", "white", bold=True)
    if kind == "self":
        canvas.line(x + 0.2, y + 0.74, x + 0.74, y + 0.2, palette.soft)


# All of them


def _heading(canvas: Canvas, y: float, text: str, ink: str) -> None:
    canvas.text(0, y, text, ink, anchor="start", bold=True)


def _box(canvas: Canvas, x: float, y: float, width: float, text: str, fill: str, ink: str = "white") -> None:
    canvas.box(x + 0.04, y, width - 0.08, 0.7, fill=fill)
    canvas.text(x + width / 2, y + 0.35, text, ink, size=9)


def write(name: str, drawn: Callable[[Palette], Canvas]) -> None:
    """NAME-light.svg and NAME-dark.svg; the same bytes each time."""
    for palette in _PALETTES:
        (_FOLDER / f"{name}-{palette.name}.svg").write_text(drawn(palette).svg())


def main() -> None:
    """Draw them all."""
    _FOLDER.mkdir(exist_ok=True)
    for picture in (lanes, draws, loss):
        write(picture.__name__, picture)


if __name__ == "__main__":
    main()
