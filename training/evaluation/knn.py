"""Features of images, their kNN accuracy, and measures of a representation without labels."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from pipelines.views import Views
from training.config import EvaluationConfig
from training.gather import Gather
from training.models.encoders import Encoder

# Test images to compare with all training images at a time, and most similarities in memory: 1 GiB.
_CHUNK, _MOST_SIMILARITIES = 1024, 1 << 28

# Wu et al. 2018 use 200 neighbours on ImageNet, less than a third of its smallest class of 732 images.
_NEIGHBOURS, _NEIGHBOURS_PER_VOTE = 200, 3

# A few stray images must not reduce the neighbours of all queries to one.
_RARE = 20


def knn_votes(
    queries: Float[Tensor, "queries dim"],
    bank: Float[Tensor, "bank dim"],
    bank_labels: Int[Tensor, " bank"],
    *,
    classes: int,
    neighbours: int,
    temperature: float,
) -> Float[Tensor, "queries classes"]:
    """Votes for each class by a query's nearest rows of `bank`; rows of both are unit vectors.

    A neighbour votes with exp(cosine similarity / temperature). Wu et al. 2018, section 3.4.
    """
    nearest, index = (queries @ bank.T).topk(min(neighbours, len(bank)), dim=1)
    # Subtracting each row's largest keeps the order of classes, and avoids overflow at small temperatures.
    weight = ((nearest - nearest[:, :1]) / temperature).exp()
    return queries.new_zeros(len(queries), classes).scatter_add_(1, bank_labels[index], weight)


def fitting_neighbours(wanted: int | None, labels: Int[Tensor, " bank"]) -> int:
    """Number of neighbours that vote, at most the whole bank; by default few enough that any class can win.

    The smallest classes, up to a twentieth of the images together, do not count.
    """
    if wanted is not None:
        return min(wanted, len(labels))
    sizes = labels.unique(return_counts=True)[1].sort().values
    smallest = int(sizes[sizes.cumsum(0) * _RARE > len(labels)][0])
    return max(1, min(_NEIGHBOURS, smallest // _NEIGHBOURS_PER_VOTE))


def knn_accuracy(
    bank: tuple[Float[Tensor, "bank dim"], Int[Tensor, " bank"]],
    queries: tuple[Float[Tensor, "queries dim"], Int[Tensor, " queries"]],
    config: EvaluationConfig,
    gather: Gather,
) -> float:
    """Share of all workers' queries that are classified correctly by the bank of all workers' images.

    Features may have any norm; each worker passes its share of both.
    """
    features, labels = F.normalize(gather.uneven_rows(bank[0]), dim=1), gather.uneven_rows(bank[1])
    asked, answers = F.normalize(gather.uneven_rows(queries[0]), dim=1), gather.uneven_rows(queries[1])
    # Labels may be any numbers; each distinct one gets a column for its votes.
    values, numbers = labels.unique(return_inverse=True)
    votes = partial(
        knn_votes,
        bank=features,
        bank_labels=numbers,
        classes=len(values),
        neighbours=fitting_neighbours(config.neighbours, labels),
        temperature=config.temperature,
    )
    right = torch.zeros((), dtype=torch.int64, device=labels.device)
    # Chunks of all workers' queries: the products round alike on any number of workers.
    chunk = max(1, min(_CHUNK, _MOST_SIMILARITIES // len(features)))
    chunks = list(zip(asked.split(chunk), answers.split(chunk), strict=True))
    for part, wanted in chunks[gather.rank :: gather.world_size]:
        right += (values[votes(part).argmax(dim=1)] == wanted).sum()
    return float(gather.total(right) / len(answers))


def embed(
    encoders: Sequence[Encoder], views: Iterable[Views], device: torch.device, *, singly: bool = False
) -> tuple[list[Float[Tensor, "n dim"]], Int[Tensor, " n"]]:
    """Features of all images' first view from each encoder, and the labels.

    singly: encode each image alone, so that rounding does not depend on the others in its batch.
    """
    features = [[torch.empty(0, encoder.dim, device=device)] for encoder in encoders]
    labels = [torch.empty(0, dtype=torch.int64, device=device)]
    with _frozen(encoders, device):
        for batch in _with_images(views):
            image = batch.to(device).images[0]
            for encoder, rows in zip(encoders, features, strict=True):
                rows.append(_encoded(encoder, image, singly))
            labels.append(batch.labels.to(device))
    return [torch.cat(rows) for rows in features], torch.cat(labels)


def embed_views(
    encoder: Encoder, views: Iterable[Views], device: torch.device, *, singly: bool = False
) -> list[Float[Tensor, "n dim"]]:
    """Features of all images' first and second view; `singly` as in `embed`."""
    features = [[torch.empty(0, encoder.dim, device=device)] for _ in range(2)]
    with _frozen([encoder], device):
        for batch in _with_images(views):
            for image, rows in zip(batch.to(device).images, features, strict=True):
                rows.append(_encoded(encoder, image, singly))
    return [torch.cat(rows) for rows in features]


def _encoded(
    encoder: Encoder, images: Float[Tensor, "n 3 height width"], singly: bool
) -> Float[Tensor, "n dim"]:
    if not singly:
        return encoder(images).float()
    # Copies, since rounding may also depend on an image's place in memory.
    return torch.cat([encoder(image.clone()).float() for image in images.split(1)])


def _with_images(views: Iterable[Views]) -> Iterator[Views]:
    return (batch for batch in views if len(batch.samples))


@contextmanager
def _frozen(encoders: Sequence[Encoder], device: torch.device) -> Iterator[None]:
    """Switch to evaluation mode, without gradients, and on a GPU in bfloat16."""
    modes = [encoder.training for encoder in encoders]
    for encoder in encoders:
        encoder.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        yield
    for encoder, mode in zip(encoders, modes, strict=True):
        encoder.train(mode)


# Below this effective rank the features have collapsed to one point, or nearly.
COLLAPSED_RANK = 1.5

# Rows of the distance matrix in memory at a time.
_PAIRS_CHUNK = 1024


def alignment(first: Float[Tensor, "n dim"], second: Float[Tensor, "n dim"]) -> float:
    """Mean squared distance between the unit features of two views of an image, in [0, 4]; lower is better.

    Wang and Isola 2020, section 4.1.1, with alpha = 2.
    """
    return float((F.normalize(first, dim=1) - F.normalize(second, dim=1)).square().sum(1).mean())


def uniformity(features: Float[Tensor, "n dim"]) -> float:
    """Log of the mean Gaussian potential of all pairs of unit features, in [-4, 0]; lower is better.

    0 where all features are equal; needs at least two. Wang and Isola 2020, section 4.1.2, with t = 2.
    """
    n, unit = len(features), F.normalize(features, dim=1)
    total = features.new_zeros((), dtype=torch.float64)
    for start in range(0, n, _PAIRS_CHUNK):
        squared = (2 - 2 * unit[start : start + _PAIRS_CHUNK] @ unit.T).clamp_min(0)
        total += (-2 * squared).exp().sum(dtype=torch.float64)
    # Without the n pairs of a feature with itself, whose potential is 1.
    return math.log(max(float(total) - n, 1e-300) / (n * (n - 1)))


def effective_rank(features: Float[Tensor, "n dim"]) -> float:
    """Number of directions that the features span, from 1 (collapsed) to their width.

    The exponential of the entropy of the singular values, as shares of their sum, of the unit features.
    Roy and Vetterli 2007, definition 1.
    """
    values = torch.linalg.svdvals(F.normalize(features, dim=1).double())
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())
