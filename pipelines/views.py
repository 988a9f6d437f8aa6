"""Views, the data that a training step gets from the pipeline."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipelines.quarantine import Quarantined


@dataclass(frozen=True, eq=False)
class Views:
    """A worker's part of one step: the views of its images, in the same order.

    images: one tensor per view, normalised, channels last in memory, which makes convolutions faster.
    labels: -1 where there is none. samples: rows of the index. quarantined: bad images of this step; in
    training another image stands in for each.
    """

    images: tuple[Float[Tensor, "n 3 height width"], ...]
    labels: Int[Tensor, " n"]
    samples: Int[np.ndarray, " n"]
    quarantined: tuple[Quarantined, ...] = ()

    def to(self, device: torch.device) -> "Views":
        """The same views on `device`, channels last there too."""
        images = tuple(
            view.to(device, non_blocking=True, memory_format=torch.channels_last) for view in self.images
        )
        return replace(self, images=images)
