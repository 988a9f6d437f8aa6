"""Linear probe: accuracy of one linear layer on frozen features."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.choice import held_out_places
from pipelines.philox import derive_key, permutation
from training.config import ProbeConfig
from training.gather import Gather
from training.optimizers import learning_rate

# First part of a random key's path; pipelines use other numbers.
_BATCHES = 6

Labelled = tuple[Float[Tensor, "n dim"], Int[Tensor, " n"]]


@dataclass(frozen=True)
class Probed:
    """The best classifier: its learning rate, and its accuracy on held-out training and on test images."""

    learning_rate: float
    held_out_top1: float
    top1: float


def linear_probe(
    train: Labelled, test: Labelled, config: ProbeConfig, *, seed: int, gather: Gather
) -> Probed:
    """Train a linear classifier on the features for each learning rate, and test the best.

    Each worker passes its share of both sets, in rank order, and trains some of the classifiers; the result
    does not depend on the number of workers. The best is chosen on a held-out part of the training features,
    never on the test set. Features are standardised, as by a batch norm without parameters; there is no
    augmentation. SGD with Nesterov momentum, no weight decay, cosine decay to zero.
    """
    features, labels = gather.uneven_rows(train[0]), gather.uneven_rows(train[1])
    queries, answers = gather.uneven_rows(test[0]), gather.uneven_rows(test[1])
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    features, queries = (features - mean) / std, (queries - mean) / std
    kept, held_out = _split(labels, config.held_out, seed)
    values, numbers = torch.cat([labels, answers]).unique(return_inverse=True)
    labels, answers = numbers.split([len(labels), len(answers)])
    scores = []
    for rate in config.learning_rates[gather.rank :: gather.world_size]:
        head = _train((features[kept], labels[kept]), len(values), rate, config, seed)
        scores.append(
            [rate, _accuracy(head, features[held_out], labels[held_out]), _accuracy(head, queries, answers)]
        )
    mine = torch.tensor(scores, dtype=torch.float64, device=labels.device).reshape(-1, 3)
    table = sorted(gather.uneven_rows(mine).tolist())
    return Probed(*max(table, key=lambda row: row[1]))


def _split(labels: Int[Tensor, " n"], share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the features to train on, and of those held out: `share` of each class."""
    places = np.arange(len(labels))
    try:
        held_out = held_out_places(places, labels.cpu().numpy(), share, seed)
    except ValueError:  # A class has only one image: hold out at random.
        held_out = held_out_places(places, None, share, seed)
    kept = np.setdiff1d(places, held_out)
    return torch.from_numpy(kept).to(labels.device), torch.from_numpy(held_out).to(labels.device)


def _train(train: Labelled, classes: int, rate: float, config: ProbeConfig, seed: int) -> nn.Linear:
    features, labels = train
    # Without the layer's own draws, which would move the generator that training's state keeps.
    head = nn.Linear(features.shape[1], classes, device="meta").to_empty(device=features.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9, nesterov=True)
    batches = list(_batches(len(labels), config, seed))
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate(step, peak=rate, steps=len(batches), warmup_steps=0)
        rows = batch.to(labels.device)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(head(features[rows]), labels[rows]).backward()
        optimizer.step()
    return head


def _batches(images: int, config: ProbeConfig, seed: int) -> Iterator[Int[Tensor, " batch"]]:
    for epoch in range(config.epochs):
        order = torch.from_numpy(permutation(derive_key(seed, _BATCHES, epoch), images))
        yield from order.split(config.batch_size)


@torch.no_grad()
def _accuracy(head: nn.Linear, features: Tensor, labels: Tensor) -> float:
    return float((head(features).argmax(1) == labels).double().mean())
