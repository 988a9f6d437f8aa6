"""A few hundred images as a run's newest encoder sees them: features, their projection and neighbours."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch.nn import functional as F

from pipelines.config import ViewRecipe
from pipelines.feed import Device, evaluation_views
from pipelines.index import Index, build_index
from pipelines.inspection import pixels
from pipelines.labels import label_names, with_labels
from pipelines.philox import derive_key, permutation
from pipelines.plan import evaluation_windows, reading_rows
from pipelines.reader import read_windows
from pipelines.views import Views
from training.checkpoint import weights_of
from training.config import TrainConfig
from training.evaluation.evaluator import Sets
from training.evaluation.knn import embed
from training.models.encoders import Encoder, build_encoder, encoder_cost
from training.run_folder import kept_index
from training.trainer import run_uri

_MOST_IMAGES, _FEWEST_IMAGES, _BATCH_SIZE = 500, 60, 50

# First part of a key's path; other modules use others.
_CHOICE = 8

# Images per fragment, unless there are too few fragments: reading one row costs its whole row group.
_PER_FRAGMENT = 16

_THUMBNAIL_SIDE = 96

# t-SNE considers about so many neighbours; below three times as many images it gets fewer.
_PERPLEXITY, _FEWEST_FOR_TSNE = 30, 12


@dataclass(frozen=True, eq=False)
class FeatureSample:
    """Images of a run and their features, by the encoder of the checkpoint of `step`.

    subset: which of the run's images they are. thumbnails: JPEGs of the encoder's input, in the same order.
    labels: -1 for none. classes: the labels' names, if they have any.
    """

    step: int
    subset: str
    thumbnails: list[bytes]
    features: Float[np.ndarray, "n dim"]
    labels: Int[np.ndarray, " n"]
    classes: tuple[str, ...]

    def class_name(self, image: int) -> str:
        """The name or number of an image's class; empty if it has none."""
        label = int(self.labels[image])
        if label < 0:
            return ""
        return self.classes[label] if label < len(self.classes) else str(label)


def affordable_images(config: TrainConfig, multiply_adds: float) -> int:
    """How many images the encoder can embed within `multiply_adds`; 0 if too few to be worth showing."""
    with torch.random.fork_rng(devices=[]):
        # Some of torchvision's networks cannot be built without arithmetic.
        cost = encoder_cost(config.encoder, config.data.view.size, "cpu")
    images = int(multiply_adds / cost.multiply_adds)
    return min(images, _MOST_IMAGES) if images >= _FEWEST_IMAGES else 0


def sample_features(config: TrainConfig, saved: dict[str, Any], images: int) -> FeatureSample:
    """At most `images` images, chosen by the run's seed, embedded by the encoder of the checkpoint `saved`.

    Test images, else held-out ones, else training images. On a GPU if there is one. Raises ValueError or
    OSError if the images are no longer there.
    """
    subset, index = _evaluated_images(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    thumbnails: list[bytes] = []
    views = _views(choose_images(index, images, config.seed), config, device)
    views = _with_thumbnails(views, config.data.view, thumbnails)
    (features,), labels = embed([_encoder(config, saved, device)], views, device)
    if not thumbnails:
        raise ValueError(f"none of the images chosen from {index.uri} can be decoded")
    return FeatureSample(
        saved["step"], subset, thumbnails, features.cpu().numpy(), labels.cpu().numpy(), label_names(index)
    )


def choose_images(index: Index, images: int, seed: int) -> Index:
    """At most `images` rows of the index, drawn by `seed` from few fragments; always the same."""
    rows = index.rows
    share = max(_PER_FRAGMENT, -(-images // len(rows)))
    starts = np.cumsum(rows) - rows
    chosen, remaining = [], images
    for fragment in permutation(derive_key(seed, _CHOICE), len(rows)).tolist():
        order = permutation(derive_key(seed, _CHOICE, fragment), int(rows[fragment]))
        taken = order[: min(share, remaining)]
        chosen.append(starts[fragment] + taken)
        remaining -= len(taken)
        if not remaining:
            break
    return index.only(np.sort(np.concatenate(chosen)))


def project(features: Float[np.ndarray, "n dim"]) -> tuple[Float[np.ndarray, "n 2"], str]:
    """The features' directions in two dimensions, always the same, and the method's name.

    Raises ValueError if there are too few, or all are one point.
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


def _evaluated_images(config: TrainConfig) -> tuple[str, Index]:
    """The most telling of the run's images, by name, and their index."""
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
    windows = evaluation_windows(index.rows, 0, 1, window_rows=size, rows_read=index.rows_read)
    tables = read_windows(index, config.data, windows)
    gpu = torch.cuda.current_device() if device.type == "cuda" else None
    yield from evaluation_views(
        tables, config.data, Device(torch.get_num_threads(), gpu), batch_size=_BATCH_SIZE
    )


def _with_thumbnails(views: Iterator[Views], recipe: ViewRecipe, thumbnails: list[bytes]) -> Iterator[Views]:
    """The same views; a JPEG of each image is appended to `thumbnails`."""
    for batch in views:
        for view in batch.images[0].float().cpu():
            thumbnails.append(jpeg(Image.fromarray(pixels(view, recipe)), _THUMBNAIL_SIDE))
        yield batch


def jpeg(image: Image.Image, most_pixels: int) -> bytes:
    """The image as a JPEG with at most `most_pixels` a side."""
    image.thumbnail((most_pixels, most_pixels))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88, subsampling=0)
    return out.getvalue()


def _encoder(config: TrainConfig, saved: dict[str, Any], device: torch.device) -> Encoder:
    encoder = build_encoder(config.encoder)
    encoder.load_state_dict(weights_of("encoder", saved))
    encoder.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return encoder
