"""A few hundred images as a run's newest encoder sees them: features, projected, and their neighbours."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch.nn import functional as F

from pipelines.feed import Device, evaluation_views
from pipelines.labels import label_names, with_labels
from pipelines.philox import derive_key, permutation
from pipelines.plan import sweep
from pipelines.preview import pixels
from pipelines.reader import read_windows
from pipelines.recipes import ViewRecipe
from pipelines.sources import Index, build_index
from pipelines.views import Views
from pipelines.windows import reading_rows
from training.checkpoint import weights_of
from training.config import TrainConfig
from training.cost import encoder_cost
from training.encoders import Encoder, build_encoder
from training.evaluate import embed
from training.evaluator import Sets
from training.record import kept_index
from training.run import run_uri

_IMAGES, _FEWEST_IMAGES, _BATCH_SIZE = 500, 60, 50

# First part of a key's path; other modules use others.
_CHOICE = 8

# Images of a fragment, unless there are too few fragments: all of a row group is read for one of its rows.
_OF_A_FRAGMENT = 16

_LARGEST_SIDE = 96

# t-SNE looks at about so many neighbours; fewer images than three times as many get fewer.
_PERPLEXITY, _FEWEST_FOR_TSNE = 30, 12


@dataclass(frozen=True, eq=False)
class Look:
    """Images of a run, as the encoder of the checkpoint of `step` sees them.

    of: which of the run's sets they are. pictures: JPEGs of what the encoder was given, in the same order.
    labels: -1 where there is none. classes: the labels' names, where they have any.
    """

    step: int
    of: str
    pictures: list[bytes]
    features: Float[np.ndarray, "n dim"]
    labels: Int[np.ndarray, " n"]
    classes: tuple[str, ...]

    def class_name(self, image: int) -> str:
        """The name or number of an image's class; empty where it has none."""
        label = int(self.labels[image])
        if label < 0:
            return ""
        return self.classes[label] if label < len(self.classes) else str(label)


def affordable(config: TrainConfig, multiply_adds: float) -> int:
    """How many images the encoder may see for so many multiply-adds; 0 where too few to be worth it."""
    with torch.random.fork_rng(devices=[]):
        # Some of torchvision's networks cannot be built without arithmetic.
        cost = encoder_cost(config.encoder, config.data.view.size, "cpu")
    images = int(multiply_adds / cost.multiply_adds)
    return min(images, _IMAGES) if images >= _FEWEST_IMAGES else 0


def look(config: TrainConfig, saved: dict[str, Any], images: int) -> Look:
    """At most so many images, chosen by the run's seed, by the encoder of the checkpoint `saved`.

    Test images, else held-out ones, else those it trained on. On a GPU if there is one. Raises ValueError or
    OSError where the images are not there any more.
    """
    of, index = _watched(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pictures: list[bytes] = []
    views = _noting(_views(choose(index, images, config.seed), config, device), config.data.view, pictures)
    (features,), labels = embed([_encoder(config, saved, device)], views, device)
    if not pictures:
        raise ValueError(f"none of the images looked at of {index.uri} can be decoded")
    return Look(saved["step"], of, pictures, features.cpu().numpy(), labels.cpu().numpy(), label_names(index))


def choose(index: Index, images: int, seed: int) -> Index:
    """At most so many rows of the index, drawn by `seed` from few fragments; always the same."""
    rows = index.rows
    share = max(_OF_A_FRAGMENT, -(-images // len(rows)))
    starts = np.cumsum(rows) - rows
    chosen, left = [], images
    for fragment in permutation(derive_key(seed, _CHOICE), len(rows)).tolist():
        taken = permutation(derive_key(seed, _CHOICE, fragment), int(rows[fragment]))[: min(share, left)]
        chosen.append(starts[fragment] + taken)
        left -= len(taken)
        if not left:
            break
    return index.only(np.sort(np.concatenate(chosen)))


def project(features: Float[np.ndarray, "n dim"]) -> tuple[Float[np.ndarray, "n 2"], str]:
    """The features' directions in two dimensions, always the same, and by what method.

    Raises ValueError where there are too few, or all are one point.
    """
    unit = _unit(features)
    if len(unit) < 3 or unit.std(0).max() < 1e-6:
        raise ValueError(
            f"there is nothing to project: {len(unit)} features that are all the same, or too few"
        )
    # scikit-learn takes a second to import.
    if len(unit) < _FEWEST_FOR_TSNE:
        from sklearn.decomposition import PCA

        return PCA(2, random_state=0).fit_transform(unit), "PCA"
    from sklearn.manifold import TSNE

    perplexity = min(_PERPLEXITY, len(unit) / 4)
    tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=0)
    return tsne.fit_transform(unit), f"t-SNE, perplexity {perplexity:g}, seed 0"


def nearest(
    features: Float[np.ndarray, "n dim"], neighbours: int
) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    """Each image's nearest others by cosine similarity, nearest first, and how similar; k <= neighbours."""
    unit = _unit(features)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, : min(neighbours, len(unit) - 1)]
    return order, np.take_along_axis(similarity, order, axis=1)


def _unit(features: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n dim"]:
    return F.normalize(torch.from_numpy(features), dim=1).numpy()


def _watched(config: TrainConfig) -> tuple[str, Index]:
    """What to call the images that tell most, and their index."""
    run, data = run_uri(config), config.data

    def index(name: str, uri: str) -> Index:
        return kept_index(run, name) or build_index(uri, data)

    if data.test:
        return "test images", index("test", data.test)
    train = index("train", data.train)
    if config.evaluation.held_out:
        train = with_labels(train, data, lambda done, of: None)
    sets = Sets.of(config, train, None)
    return ("held-out images", sets.held_out) if sets.held_out else ("training images", sets.train)


def _views(index: Index, config: TrainConfig, device: torch.device) -> Iterator[Views]:
    size = reading_rows(index, config.data)
    windows = sweep(index.rows, 0, 1, window_rows=size, rows_read=index.rows_read)
    tables = read_windows(index, config.data, windows)
    gpu = torch.cuda.current_device() if device.type == "cuda" else None
    yield from evaluation_views(
        tables, config.data, Device(torch.get_num_threads(), gpu), batch_size=_BATCH_SIZE
    )


def _noting(views: Iterator[Views], recipe: ViewRecipe, pictures: list[bytes]) -> Iterator[Views]:
    """The same views; `pictures` gets a JPEG of each image."""
    for batch in views:
        for view in batch.images[0].float().cpu():
            pictures.append(_jpeg(Image.fromarray(pixels(view, recipe))))
        yield batch


def _jpeg(image: Image.Image) -> bytes:
    image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88, subsampling=0)
    return out.getvalue()


def _encoder(config: TrainConfig, saved: dict[str, Any], device: torch.device) -> Encoder:
    encoder = build_encoder(config.encoder)
    encoder.load_state_dict(weights_of("encoder", saved))
    encoder.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return encoder
