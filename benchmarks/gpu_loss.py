"""gpu.py's section `loss`: NT-Xent forward and backward against its peers and against variants of itself.

FLOPs are those that the loss needs: with 2N rows of d numbers, half of the symmetric matrix of similarities
twice, forward and again backward, and its product with the rows once: 4 (2N)^2 d, multiply-adds counting as
two. Whoever computes more is not credited for it.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.comparison import spread
from benchmarks.gpu_loss_variants import blockwise_nt_xent, sides
from benchmarks.gpu_machine import data_sheet_rate, matrix_precision, matrix_rate
from benchmarks.gpu_report import NEEDS_CUDA, Report, Setting, in_turns, seconds_each
from training.losses import nt_xent

_TEMPERATURE, _DIM = 0.1, 128
_PAIRS, _SMALL_PAIRS = (4096, 16384, 65536), (96, 256)
_ROUND_SECONDS = 0.3

Loss = Callable[[Tensor, Tensor], Tensor]


def run(setting: Setting, report: Report) -> None:
    """Peers first, then what our own could be, at each number of pairs."""
    rates = _rates(setting, report)
    losses = _losses(setting, report)
    smallest = _SMALL_PAIRS[0] if setting.small else _PAIRS[0]
    with report.part("errors"):
        _errors(losses, smallest, setting, report)
    for pairs in _SMALL_PAIRS if setting.small else _PAIRS:
        what = f"{pairs:,} pairs"
        if report.has_time(what, 10):
            with report.part(what):
                _compare(pairs, losses, rates, setting, report)


def _rates(setting: Setting, report: Report) -> dict[str, float]:
    """FLOP/s of a large matrix product, as measured here."""
    rates = {}
    for kind in ("float32", "TF32", "bfloat16"):
        rates[kind] = matrix_rate(setting.device, kind, small=setting.small)
        sheet = data_sheet_rate(setting.device, kind)
        beside = f", {sheet / 1e12:,.0f} by the data sheet" if sheet else ""
        report.say(f"  a large product in {kind:<26} {rates[kind] / 1e12:,.2f} TFLOP/s{beside}")
        report.note(f"product in {kind}", flops_per_second=rates[kind], data_sheet=sheet)
    return rates


def _losses(setting: Setting, report: Report) -> dict[str, Loss]:
    """By name; where no name of a precision is in it, products are in float32."""
    ours = partial(nt_xent, temperature=_TEMPERATURE)
    found: dict[str, Loss] = {"diptych": ours, "diptych, TF32": _in_tf32(ours)}
    for side in (64, 128) if setting.small else (2048, 8192, 16384):
        found[f"diptych, blocks of {side:,}"] = _with_side(side, ours)
    compiled = partial(blockwise_nt_xent, temperature=_TEMPERATURE, compiled=True)
    found["compiled blocks"] = compiled
    found["compiled blocks, TF32"] = _in_tf32(compiled)
    if setting.device.type == "cuda":
        found["blocks, bfloat16"] = partial(blockwise_nt_xent, temperature=_TEMPERATURE, half=True)
    else:
        report.skip("blocks, bfloat16", NEEDS_CUDA)
    return found | {"full matrix": _full_matrix} | _peers(report)


def _peers(report: Report) -> dict[str, Loss]:
    found: dict[str, Loss] = {}
    try:
        from lightly.loss import NTXentLoss

        found["lightly"] = NTXentLoss(temperature=_TEMPERATURE)
    except ImportError as error:
        report.skip("lightly", str(error))
    try:
        from open_clip.loss import ClipLoss  # pyright: ignore[reportMissingImports]

        # Another loss: a view is compared with the other view's rows alone, half as much.
        clip = ClipLoss()
        found["open_clip's ClipLoss"] = lambda first, second: clip(
            F.normalize(first, dim=1), F.normalize(second, dim=1), 1 / _TEMPERATURE
        )
    except ImportError as error:
        report.skip("open_clip's ClipLoss", str(error))
    return found


def _full_matrix(first: Tensor, second: Tensor) -> Tensor:
    """The loss written out: cross entropy over all similarities."""
    rows = F.normalize(torch.cat([first, second]), dim=1)
    logits = rows @ rows.T / _TEMPERATURE
    logits = logits.fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(rows), device=rows.device).roll(len(first)))


def _in_tf32(loss: Loss) -> Loss:
    loss = partial(loss)
    loss.precision = "high"  # pyright: ignore[reportAttributeAccessIssue]
    return loss


def _with_side(side: int, loss: Loss) -> Loss:
    loss = partial(loss)
    loss.side = side  # pyright: ignore[reportAttributeAccessIssue]
    return loss


@contextmanager
def _settings_of(loss: Any) -> Iterator[None]:
    """Its precision and block size, backward included."""
    with matrix_precision(getattr(loss, "precision", "highest")), sides(getattr(loss, "side", None)):
        yield


def _views(pairs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(pairs)
    first, noise = torch.randn(2, pairs, _DIM, generator=generator)
    second = first + noise
    return first.to(device).requires_grad_(), second.to(device).requires_grad_()


def _once(loss: Loss, views: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    with _settings_of(loss):
        value = loss(*views)
        return value.detach(), torch.autograd.grad(value, views)


def _errors(losses: dict[str, Loss], pairs: int, setting: Setting, report: Report) -> None:
    """How far each is from the loss in float64, relative to it, and from its gradient."""
    views = _views(pairs, setting.device)
    exact = _once(_full_matrix, tuple(view.detach().double().requires_grad_() for view in views))  # pyright: ignore
    report.say(f"  errors at {pairs:,} pairs: of the loss, and of its gradient")
    for name, loss in losses.items():
        if "ClipLoss" in name or not report.has_time(f"error of {name}"):
            continue
        with report.part(f"error of {name}"):
            value, gradients = _once(loss, views)
            off = float((value - exact[0]).abs() / exact[0])
            ratios = [
                float((mine - right).norm() / right.norm())
                for mine, right in zip(gradients, exact[1], strict=True)
            ]
            report.say(f"    {name:<42} {off:.1e}, {max(ratios):.1e}")
            report.note(f"error of {name}", pairs=pairs, loss=off, gradient=max(ratios))


def _compare(
    pairs: int, losses: dict[str, Loss], rates: dict[str, float], setting: Setting, report: Report
) -> None:
    report.say(f"  {pairs:,} pairs")
    views, device = _views(pairs, setting.device), setting.device
    memory = {}
    for name, loss in losses.items():
        if report.left < 5:
            report.skip(f"{name}, {pairs:,} pairs", "no time left")
            continue
        try:
            memory[name] = _peak_bytes(loss, views, device)
        except torch.OutOfMemoryError as error:
            found = report.failed if name == "diptych" else report.skip
            found(f"{name}, {pairs:,} pairs", str(error).split(". ")[0])
        except Exception as error:
            report.failed(f"{name}, {pairs:,} pairs", f"{type(error).__name__}: {error}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    works = {name: partial(_once, losses[name], views) for name in memory}
    rounds = _affordable(works, setting, report)
    found = in_turns(works, device, rounds=rounds, seconds=0.0 if setting.small else _ROUND_SECONDS)
    _tell(pairs, found, memory, rates, setting, report)


def _affordable(works: dict[str, Callable], setting: Setting, report: Report) -> int:
    """Rounds that a third of the time left has room for, one at least."""
    round_seconds = sum(max(_ROUND_SECONDS, seconds_each(work, setting.device, 0)) for work in works.values())
    return max(1, min(setting.rounds, int(report.left / 3 / round_seconds) - 1))


def _peak_bytes(loss: Loss, views: tuple[Tensor, Tensor], device: torch.device) -> int | None:
    """Memory at the peak above that of the projections; None on a CPU. Compiles what is compiled, too."""
    _once(loss, views)
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _once(loss, views)
    return torch.cuda.max_memory_allocated(device) - before


def _tell(
    pairs: int,
    found: dict[str, list[float]],
    memory: dict[str, int | None],
    rates: dict[str, float],
    setting: Setting,
    report: Report,
) -> None:
    flops = 4 * (2 * pairs) ** 2 * _DIM
    for name, seconds in found.items():
        peak = memory[name]
        rate = flops / statistics.median(seconds)
        shares = ", ".join(f"{rate / best:.1%} of {kind}" for kind, best in rates.items())
        used = f"skipped, {NEEDS_CUDA}" if peak is None else f"{peak / 1e6:,.0f} MB"
        report.say(f"    {name:<28} {spread([1e3 * each for each in seconds], ',.2f')} ms; memory {used}")
        report.say(f"    {'':<28} {rate / 1e12:,.3f} TFLOP/s: {shares}")
        report.note(
            f"{name}, {pairs:,} pairs", pairs=pairs, unit="s", values=seconds, peak_bytes=peak, flops=flops,
            shares={kind: rate / best for kind, best in rates.items()},
        )  # fmt: skip
    for name in set(found) & {"lightly", "full matrix", "open_clip's ClipLoss"}:
        ratios = [mine / theirs for mine, theirs in zip(found["diptych"], found[name], strict=True)]
        report.measured(f"diptych's time over {name}'s", ratios, "", ".3f", pairs=pairs)
    own = {name: statistics.median(each) for name, each in found.items() if _is_ours(name)}
    best = min(own, key=lambda name: own[name])
    report.say(
        f"  best of ours at {pairs:,} pairs: {best}, {own['diptych'] / own[best]:.2f} times as fast as is"
    )
    report.note("best of ours", pairs=pairs, name=best, times_as_fast=own["diptych"] / own[best])


def _is_ours(name: str) -> bool:
    return name.startswith(("diptych", "compiled", "blocks"))
