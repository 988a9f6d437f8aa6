"""The images of a run's report as HTML: with their views, as points of the feature space, and neighbours."""

import base64
import html
import io

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from pipelines.preview import GAP
from training.report_curves import COLOURS, legend
from training.report_images import Look, nearest, project

# As pipelines.preview lays them out, one row each.
_TILES = ("Image", "First view of image", "Second view of image")

_WIDTH, _HEIGHT, _MARGIN = 1000, 640, 8

# Neighbours that are shown, and images whose neighbours are.
_NEIGHBOURS, _QUERIES = 8, 8

# More classes than these are told apart by the picture under the pointer alone.
_MOST_IN_LEGEND = 20

STYLE = """
.views { display: grid; grid-template-columns: repeat(auto-fill, minmax(4.5rem, 1fr)); gap: .75rem .5rem; }
.views div { display: grid; gap: .2rem; } .views img { width: 100%; border-radius: .25rem; display: block; }
.map { position: relative; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.map svg { display: block; width: 100%; overflow: visible; }
.map g { transform-box: fill-box; transform-origin: center; transition: opacity .15s; }
.map rect { fill: none; stroke-width: 3; }
.map.only g:not(.chosen) { opacity: .06; pointer-events: none; }
.lens { position: absolute; pointer-events: none; display: none; background: var(--paper); padding: .35rem;
  border: 1px solid var(--line); border-radius: .5rem; font-size: .85rem; width: 7.7rem; z-index: 1;
  text-align: center; box-shadow: 0 .25rem 1rem #0004; }
.lens img { width: 7rem; display: block; } .pixels img, .pixels image { image-rendering: pixelated; }
.legend button { all: unset; cursor: pointer; } .legend button:focus-visible { outline: 2px solid; }
.legend button[aria-pressed=true] { color: var(--ink); font-weight: 600; }
.near { display: grid; gap: .5rem; }
.near > div { display: grid; grid-template-columns: repeat(9, 1fr); gap: .35rem; }
.near > div > :first-child { margin: 0 .3rem 0 -.3rem; }
.near span { font-size: .72rem; line-height: 1.3; text-align: center; color: var(--soft); min-width: 0;
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.near img { width: 100%; display: block; border-radius: .25rem; border: 3px solid transparent; }
.near span:first-child { color: var(--ink); font-weight: 600; }
.near .same img { border-color: #3a9e6b; }
@media (max-width: 600px) { .map g { transform: scale(1.7); } .near > div { gap: .15rem; }
  .near img { border-width: 2px; } .near span { font-size: .6rem; } }
"""

_SCRIPT = """<script>
document.querySelectorAll(".map").forEach(map => {
  const lens = map.querySelector(".lens");
  const picture = lens.querySelector("img"), said = lens.querySelector("b");
  const show = event => {
    const point = event.target.closest("g");
    lens.style.display = point ? "block" : "none";
    if (!point) return;
    point.parentNode.append(point);
    picture.src = point.querySelector("image").getAttribute("href");
    said.textContent = point.dataset.name;
    const box = map.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    lens.style.left = Math.max(0, Math.min(x + 16, box.width - lens.offsetWidth)) + "px";
    lens.style.top = (y > box.height / 2 ? y - lens.offsetHeight - 16 : y + 16) + "px";
  };
  map.addEventListener("pointermove", show);
  map.addEventListener("pointerdown", show);
  map.addEventListener("pointerleave", () => lens.style.display = "none");
  const buttons = [...map.parentNode.querySelectorAll(".legend button")];
  buttons.forEach(button => button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    buttons.forEach(each => each.setAttribute("aria-pressed", on && each === button));
    map.classList.toggle("only", on);
    map.querySelectorAll("g").forEach(point =>
      point.classList.toggle("chosen", point.dataset.name === button.textContent));
  }));
});
</script>"""


def views_sheet(sheet: bytes, views: int) -> str:
    """The contact sheet of images and their one or two views, cut up so that a phone can wrap it."""
    image = Image.open(io.BytesIO(sheet)).convert("RGB")
    names = _TILES[: 1 + views]
    pitch = (image.height + GAP) // len(names)
    columns = []
    for number, x in enumerate(range(0, image.width, pitch), 1):
        tiles = [image.crop((x, y, x + pitch - GAP, y + pitch - GAP)) for y in range(0, image.height, pitch)]
        columns.append(
            "".join(
                f'<img alt="{what} {number}" src="{_source(_jpeg(tile))}">'
                for what, tile in zip(names, tiles, strict=True)
            )
        )
    return f'<div class="views">{"".join(f"<div>{column}</div>" for column in columns)}</div>'


def feature_map(seen: Look) -> str:
    """The images where their features lie; raises ValueError as project does."""
    points, method = project(seen.features)
    labelled = bool((seen.labels >= 0).any())
    framed = " The frame is the class: choose one below to see it alone." if labelled else ""
    about = (
        f"{len(points)} {seen.of} as the encoder sees them after {seen.step:,} steps, placed by {method}, on "
        f"the directions of the features. Images that lie close have like features; how far groups are "
        f"apart, and the axes, mean nothing.{framed}"
    )
    lens = '<div class="lens"><img alt=""><b></b></div>'
    return (
        f'<p class="soft">{about}</p><div><div class="map{_crisp(seen)}">{_svg(seen, points)}{lens}</div>'
        f"{_classes_legend(seen)}</div>{_SCRIPT}"
    )


def neighbours(seen: Look) -> str:
    """A few images and, right of each, those with the most similar features."""
    order, similarity = nearest(seen.features, _NEIGHBOURS)
    labelled = seen.labels >= 0
    about = f"Left: an image; then its nearest among the {len(order)}, with their cosine similarity."
    if labelled.any():
        same = (seen.labels[order] == seen.labels[:, None])[labelled].mean()
        chance = _chance(seen.labels[labelled])
        about += (
            f" Framed in green: of the same class. Over all, {same:.0%} of the {order.shape[1]} nearest are; "
            f"by chance it would be {chance:.0%}."
        )
    rows = "".join(_row(seen, query, order[query], similarity[query]) for query in queries(seen.labels))
    return f'<p class="soft">{about}</p><div class="near{_crisp(seen)}">{rows}</div>'


def queries(labels: Int[np.ndarray, " n"]) -> list[int]:
    """The first image of each of a few classes; without labels, the first images."""
    _, firsts = np.unique(labels, return_index=True)
    firsts = firsts[labels[firsts] >= 0]
    others = np.setdiff1d(np.arange(len(labels)), firsts)
    return np.concatenate([firsts, others])[:_QUERIES].tolist()


def _chance(labels: Int[np.ndarray, " n"]) -> float:
    """Share of all pairs of images that are of one class."""
    counts = np.unique(labels, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / max(1, len(labels) * (len(labels) - 1)))


def _row(seen: Look, query: int, order: Int[np.ndarray, " k"], similarity: Float[np.ndarray, " k"]) -> str:
    cells = [_cell(seen, query, seen.class_name(query) or "image", "")]
    for image, near in zip(order.tolist(), similarity.tolist(), strict=True):
        same = seen.labels[image] == seen.labels[query]
        judged = "same" if same and seen.labels[query] >= 0 else ""
        cells.append(_cell(seen, image, f"{near:.3f}", judged))
    return f"<div>{''.join(cells)}</div>"


def _cell(seen: Look, image: int, text: str, judged: str) -> str:
    name = html.escape(seen.class_name(image) or "image")
    return (
        f'<span class="{judged}" title="{name}"><img alt="{name}" src="{_source(seen.pictures[image])}">'
        f"{html.escape(text)}</span>"
    )


def _svg(seen: Look, points: Float[np.ndarray, "n 2"]) -> str:
    side = float(np.clip(np.sqrt(0.5 * _WIDTH * _HEIGHT / len(points)), 24, 64))
    low, high = points.min(0), points.max(0)
    room = np.array([_WIDTH, _HEIGHT]) - side - 2 * _MARGIN
    places = _MARGIN + (points - low) / np.maximum(high - low, 1e-12) * room
    drawn = "".join(_point(seen, image, x, y, side) for image, (x, y) in enumerate(places.tolist()))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Images where their features lie">'
        f"{drawn}</svg>"
    )


def _point(seen: Look, image: int, x: float, y: float, side: float) -> str:
    name = html.escape(seen.class_name(image))
    place = f'x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}"'
    label = int(seen.labels[image])
    frame = f'<rect {place} rx="2" stroke="{class_colour(label)}"/>' if label >= 0 else ""
    return f'<g data-name="{name}"><image {place} href="{_source(seen.pictures[image])}"/>{frame}</g>'


def class_colour(label: int) -> str:
    """A colour of its own for each of the first classes; later ones have hues that are far apart."""
    return COLOURS[label] if label < len(COLOURS) else f"hsl({label * 137.508 % 360:.0f} 60% 52%)"


def _classes_legend(seen: Look) -> str:
    labels, firsts = np.unique(seen.labels, return_index=True)
    entries = [
        (class_colour(label), seen.class_name(first))
        for label, first in zip(labels.tolist(), firsts.tolist(), strict=True)
        if label >= 0
    ]
    return legend(entries, pressed=True) if len(entries) <= _MOST_IN_LEGEND else ""


def _crisp(seen: Look) -> str:
    """Small images are shown with their pixels, and not blurred."""
    return " pixels" if Image.open(io.BytesIO(seen.pictures[0])).width < 64 else ""


def _jpeg(image: Image.Image) -> bytes:
    image.thumbnail((128, 128))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88, subsampling=0)
    return out.getvalue()


def _source(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
