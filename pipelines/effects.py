"""What is done to a view once it is cropped: colour, blur, solarisation, Sobel, normalisation and cutout.

In PyTorch, on the device that the view is on. Every sum is written out element by element, so that a view
has the same bits whatever batch it is in.
"""

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import pad

from pipelines.colour import Colours
from pipelines.draws import Draws
from pipelines.recipes import ViewRecipe

# Sobel's filters: one of these along rows, the other along columns. A gradient stays on the view's scale.
_SMOOTH, _DIFFERENCE = (0.25, 0.5, 0.25), (-0.5, 0.0, 0.5)

_Planes = Float[Tensor, "n 3 size size"]


class Effects:
    """The effects that a recipe has on a batch of views, with their draws."""

    def __init__(self, recipe: ViewRecipe, draws: Draws, device: torch.device) -> None:
        self._recipe, self._draws = recipe, draws

        def moved(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self._mean, self._std = (
            torch.tensor(values, device=device)[:, None, None] * 255 for values in (recipe.mean, recipe.std)
        )
        self._colours = Colours(recipe, draws, device) if recipe.jitter > 0 or recipe.grey > 0 else None
        if recipe.blur:
            self._reach, taps = _gaussians(draws, recipe.size)
            self._taps = moved(taps)
        if recipe.cutout:
            self._hole = moved(np.where(draws.cutout[:, None], draws.hole, 0))

    def apply(self, cropped: UInt8[Tensor, "m size size 3"], rows: slice) -> _Planes:
        """The views of `rows`, a part of the batch, normalised."""
        planes = cropped.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        if self._colours:
            self._colours.apply(planes, rows)
        if self._recipe.blur:
            self._blur(planes, rows)
        if self._recipe.solarise:
            chosen = np.flatnonzero(self._draws.solarise[rows])
            planes[chosen] = _solarised(planes[chosen], 255 * self._recipe.solarise_threshold)
        if self._recipe.sobel:
            chosen = np.flatnonzero(self._draws.sobel[rows])
            planes[chosen] = _edges(planes[chosen])
        planes.sub_(self._mean).div_(self._std)
        if self._recipe.cutout:
            planes.masked_fill_(_inside(self._hole[rows], self._recipe.size), 0.0)
        return planes

    def _blur(self, planes: _Planes, rows: slice) -> None:
        reach = self._reach[rows]
        taps, middle = self._taps[rows], self._taps.shape[1] // 2
        for width in np.unique(reach[reach > 0]).tolist():
            chosen = np.flatnonzero(reach == width)
            kernel = taps[chosen, middle - width : middle + width + 1]
            blurred = _filtered(_filtered(planes[chosen], kernel, dim=2), kernel, dim=3)
            planes[chosen] = blurred


def _gaussians(draws: Draws, size: int) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n taps"]]:
    """Kernels a tenth of the view wide, and how far each reaches: taps beyond three sigma add nothing.

    Those of views that are not blurred reach nowhere.
    """
    widest = max(1, size // 10) // 2
    reach = np.where(draws.blur, np.minimum(widest, np.ceil(3 * draws.sigma)), 0).astype(int)
    offsets = np.arange(-widest, widest + 1)
    taps = np.exp(-0.5 * (offsets / draws.sigma[:, None]) ** 2) * (abs(offsets) <= reach[:, None])
    return reach, (taps / taps.sum(axis=1, keepdims=True)).astype(np.float32)


def _filtered(planes: _Planes, taps: Float[Tensor, "n taps"], *, dim: int) -> _Planes:
    """Correlation along one axis; the border is reflected. `taps` (n or 1, odd)."""
    reach, size = taps.shape[1] // 2, planes.shape[dim]
    padded = pad(planes, (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0), "reflect")
    weights = taps[:, :, None, None, None]
    result = padded.narrow(dim, 0, size) * weights[:, 0]
    for tap in range(1, 2 * reach + 1):
        result.addcmul_(padded.narrow(dim, tap, size), weights[:, tap])
    return result


def _solarised(planes: _Planes, threshold: float) -> _Planes:
    return torch.where(planes >= threshold, 255 - planes, planes)


def _edges(planes: _Planes) -> _Planes:
    """Length of each channel's gradient."""
    smooth, difference = (torch.tensor([taps], device=planes.device) for taps in (_SMOOTH, _DIFFERENCE))
    down = _filtered(_filtered(planes, smooth, dim=3), difference, dim=2)
    right = _filtered(_filtered(planes, smooth, dim=2), difference, dim=3)
    return down.mul_(down).add_(right.mul_(right)).sqrt_()


def _inside(hole: Int[Tensor, "n 4"], size: int) -> Tensor:
    """Which pixels lie in the hole."""
    place = torch.arange(size, device=hole.device)
    start, end = hole[:, :2], hole[:, :2] + hole[:, 2:]
    rows, columns = ((place >= start[:, axis, None]) & (place < end[:, axis, None]) for axis in range(2))
    return (rows[:, :, None] & columns[:, None, :])[:, None]
