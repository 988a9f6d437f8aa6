"""kNN accuracy of features on held-out images."""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.views import Views
from training.config import EvaluationConfig
from training.gather import Gather

# Side to which images are scaled down before their raw pixels are compared.
_PIXELS = 32

# Test images that are compared with all training images at a time.
_CHUNK = 256


def knn_votes(
    queries: Float[Tensor, "queries dim"],
    bank: Float[Tensor, "bank dim"],
    bank_labels: Int[Tensor, " bank"],
    *,
    classes: int,
    neighbours: int,
    temperature: float,
) -> Float[Tensor, "queries classes"]:
    """Each class's votes by the nearest of `bank`; rows of both are unit vectors.

    A neighbour votes with exp(cosine similarity / temperature). Wu et al. 2018, section 3.4.
    """
    votes = queries.new_zeros(len(queries), classes)
    for start in range(0, len(queries), _CHUNK):
        similarity = queries[start : start + _CHUNK] @ bank.T
        nearest, index = similarity.topk(min(neighbours, len(bank)), dim=1)
        # Less each row's largest: the same order of classes, and no overflow at small temperatures.
        weight = ((nearest - nearest[:, :1]) / temperature).exp()
        votes[start : start + _CHUNK].scatter_add_(1, bank_labels[index], weight)
    return votes


def knn_accuracy(
    bank: tuple[Float[Tensor, "bank dim"], Int[Tensor, " bank"]],
    queries: tuple[Float[Tensor, "queries dim"], Int[Tensor, " queries"]],
    config: EvaluationConfig,
    gather: Gather,
) -> float:
    """Share of all workers' queries that the bank of all workers' images classifies rightly.

    Features need no particular length; each worker brings its share of both.
    """
    features, labels = gather.uneven_rows(F.normalize(bank[0], dim=1)), gather.uneven_rows(bank[1])
    votes = knn_votes(
        F.normalize(queries[0], dim=1),
        features,
        labels,
        classes=int(labels.max()) + 1,
        neighbours=config.neighbours,
        temperature=config.temperature,
    )
    right = (votes.argmax(dim=1) == queries[1]).sum()
    counts = gather.total(torch.stack([right, torch.tensor(len(queries[1]), device=right.device)]))
    return float(counts[0] / counts[1])


@torch.no_grad()
def embed(
    encoder: nn.Module, views: Iterable[Views], device: torch.device, *, pixels: bool
) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n pixels"] | None, Int[Tensor, " n"]]:
    """Features, raw pixels if wanted, and labels of all `views`."""
    was_training = encoder.training
    encoder.eval()
    features, raw, labels = [], [], []
    for batch in views:
        images = batch.to(device).images[0]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features.append(encoder(images).float())
        if pixels:
            raw.append(F.interpolate(images, min(_PIXELS, images.shape[-1]), mode="area").flatten(1))
        labels.append(batch.labels.to(device))
    encoder.train(was_training)
    return torch.cat(features), torch.cat(raw) if pixels else None, torch.cat(labels)
