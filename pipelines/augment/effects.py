"""Effects on a cropped view: colour, blur, solarisation, Sobel, normalisation and cutout.

In PyTorch, in place, on the view's device. Every colour step but the hue is `scale x pixel + share x grey`.
So all views with the hue at the same step are processed together, whatever the order of their other steps.
Every sum is computed element by element, so a view has the same bits in any batch.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import pad

from pipelines.augment.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, Draws
from pipelines.config import ViewRecipe

# Weights of red, green and blue in a grey value: ITU-R BT.601, as in PIL; torchvision rounds them.
_LUMA = (0.299, 0.587, 0.114)

# Bytes of views processed at a time on a CPU, so that they and the intermediate results stay in a core's
# cache. A GPU processes all at once.
_CPU_BYTES = 2**18

_STEPS = 4  # Brightness, contrast, saturation and hue.

# Below this chroma, in grey levels, the hue does not matter.
_NO_CHROMA = 1e-3

_Planes = Float[Tensor, "n 3 height width"]


class Colours:
    """Colour jitter and greyscale for a batch of views, from their draws."""

    def __init__(self, recipe: ViewRecipe, draws: Draws, device: torch.device) -> None:
        self._jitter, self._grey, self._device = draws.jitter & (recipe.jitter > 0), draws.grey, device
        kinds, factors = draws.order, np.take_along_axis(draws.factors, draws.order, axis=1)
        self._hue_step = np.argmax(kinds == HUE, axis=1)
        # One value for each view and step. A hue step has scale 1 and adds nothing.
        adds = (kinds == BRIGHTNESS) & (recipe.brightness_by == "shift")
        scale = np.where(adds | (kinds == HUE), 1.0, factors)
        self._scale, self._shift, self._to_mean, self._to_grey, self._turns = (
            values.astype(np.float32)
            for values in (
                scale,
                np.where(adds, 255 * factors, 0),
                np.where(kinds == CONTRAST, 1 - scale, 0),
                np.where(kinds == SATURATION, 1 - scale, 0),
                np.where(kinds == HUE, 6 * factors, 0),
            )
        )

    def apply(self, planes: _Planes, rows: slice) -> None:
        """Change `planes` (0 to 255) in place: the views `rows` of the batch."""
        first = rows.start or 0
        for places in self._groups(planes, rows):
            alone = len(places) == 1
            moved = torch.from_numpy(places).to(self._device)
            views = planes[places[0] : places[0] + 1] if alone else planes.index_select(0, moved)
            self._change(views, first + places)
            if not alone:
                planes.index_copy_(0, moved, views)
        if len(grey := np.flatnonzero(self._grey[rows])):
            planes[grey] = _luma(planes[grey])

    def _groups(self, planes: _Planes, rows: slice) -> Iterator[Int[np.ndarray, " some"]]:
        """Positions in `planes` of jittered views with the hue at the same step, in limited groups."""
        most = len(planes) if planes.is_cuda else max(1, _CPU_BYTES // planes[0].nbytes)
        for step in range(_STEPS):
            places = np.flatnonzero(self._jitter[rows] & (self._hue_step[rows] == step))
            for start in range(0, len(places), most):
                yield places[start : start + most]

    def _change(self, views: _Planes, rows: Int[np.ndarray, " some"]) -> None:
        """Apply all steps to `views`, which are `rows` of the batch."""
        for step in range(_STEPS):
            if step != self._hue_step[rows[0]]:
                self._mix(views, rows, step)
            elif self._turns[rows, step].any():
                _shift_hue(views, self._column(self._turns[rows, step]))

    def _mix(self, views: _Planes, rows: Int[np.ndarray, " some"], step: int) -> None:
        """Apply brightness, contrast or saturation; each view may be at a different one."""
        scale, shift, to_mean, to_grey = (
            values[rows, step] for values in (self._scale, self._shift, self._to_mean, self._to_grey)
        )
        added: list[Tensor | float] = [self._column(shift)] if shift.any() else []
        if to_mean.any():
            added.append(_luma(views.mean(dim=(2, 3), keepdim=True)).mul_(self._column(to_mean)))
        if to_grey.any():
            added.append(_luma(views).mul_(self._column(to_grey)))
        if added or (scale != 1).any():
            views.mul_(self._column(scale))
            for amount in added:
                views.add_(amount)
            views.clamp_(0, 255)

    def _column(self, values: Float[np.ndarray, " some"]) -> Any:
        """One number for each view, in a shape that broadcasts over planes."""
        if len(values) == 1:
            return values.item()
        return torch.from_numpy(values).to(self._device)[:, None, None, None]


def _luma(planes: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1 h w"]:
    # A matrix product's rounding would depend on the batch size and on PyTorch's settings.
    red, green, blue = planes.split(1, dim=1)
    return red.mul(_LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def _shift_hue(planes: _Planes, sixths: Any) -> None:
    """Shift the hue in HSV in place, in sixths of a turn (a number or n x 1 x 1 x 1); keep value and chroma.

    For hue h in sixths of a turn: red = low + chroma x clamp(|h - 3| - 1, 0, 1), green = low + chroma x
    clamp(2 - |h - 2|, 0, 1), blue = low + chroma x clamp(2 - |h - 4|, 0, 1).
    """
    red, green, blue = planes.split(1, dim=1)
    high, low, chroma, hue, other, no = red.new_empty(6, *red.shape)
    torch.maximum(torch.maximum(red, green, out=high), blue, out=high)
    torch.minimum(torch.minimum(red, green, out=low), blue, out=low)
    torch.sub(high, low, out=chroma)
    # hue x chroma, whose formula depends on the highest channel. Comparisons and torch.where would take ten
    # times as long as this arithmetic: `no` is 0 where the channel is the highest, and 1 elsewhere.
    torch.sub(red, green, out=hue).add_(chroma, alpha=4)
    for highest, right, left, offset in ((green, blue, red, 2), (red, green, blue, 0)):
        torch.sub(right, left, out=other).add_(chroma, alpha=offset)
        torch.lerp(other, hue, torch.sub(high, highest, out=no).sign_(), out=hue)
    hue.div_(torch.clamp(chroma, min=_NO_CHROMA, out=other)).add_(sixths)
    hue.sub_(torch.mul(hue, 1 / 6, out=other).floor_(), alpha=6)
    base = low.sub_(chroma)
    torch.addcmul(base, chroma, _clamped(hue, 3, other), out=red)
    base.add_(chroma, alpha=3)
    torch.addcmul(base, chroma, _clamped(hue, 2, other), value=-1, out=green)
    torch.addcmul(base, chroma, _clamped(hue, 4, other), value=-1, out=blue)


def _clamped(hue: Tensor, middle: float, out: Tensor) -> Tensor:
    return torch.sub(hue, middle, out=out).abs_().clamp_(1, 2)


# Sobel filters: one along rows, the other along columns, scaled so that gradients stay in the view's range.
_SMOOTH, _DIFFERENCE = (0.25, 0.5, 0.25), (-0.5, 0.0, 0.5)


class Effects:
    """The effects of a recipe on a batch of views, with their draws."""

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
        """The finished, normalised views of `cropped`, which are `rows` of the batch."""
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
    """The radius and the taps of each view's kernel, a tenth of the view wide and cut off at three sigma.

    The radius is 0 for views that are not blurred.
    """
    widest = max(1, size // 10) // 2
    reach = np.where(draws.blur, np.minimum(widest, np.ceil(3 * draws.sigma)), 0).astype(int)
    offsets = np.arange(-widest, widest + 1)
    taps = np.exp(-0.5 * (offsets / draws.sigma[:, None]) ** 2) * (abs(offsets) <= reach[:, None])
    return reach, (taps / taps.sum(axis=1, keepdims=True)).astype(np.float32)


def _filtered(planes: _Planes, taps: Float[Tensor, "n taps"], *, dim: int) -> _Planes:
    """Correlation along one axis with a reflected border. The number of taps is odd; n may be 1."""
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
    """Magnitude of each channel's gradient."""
    smooth, difference = (torch.tensor([taps], device=planes.device) for taps in (_SMOOTH, _DIFFERENCE))
    down = _filtered(_filtered(planes, smooth, dim=3), difference, dim=2)
    right = _filtered(_filtered(planes, smooth, dim=2), difference, dim=3)
    return down.mul_(down).add_(right.mul_(right)).sqrt_()


def _inside(hole: Int[Tensor, "n 4"], size: int) -> Tensor:
    """A mask of the pixels in the hole."""
    place = torch.arange(size, device=hole.device)
    start, end = hole[:, :2], hole[:, :2] + hole[:, 2:]
    rows, columns = ((place >= start[:, axis, None]) & (place < end[:, axis, None]) for axis in range(2))
    return (rows[:, :, None] & columns[:, None, :])[:, None]
