"""Keeps torch's compiler, some seconds of imports, out of processes that compile nothing."""

from collections.abc import Callable
from typing import Any

import torch


def leave_unmarked(kind: type) -> None:
    """Call this class's methods as they are.

    A method under `torch._disable_dynamo` loads the compiler at its first call, to be marked for it; the mark
    is looked for in this attribute. Nothing that is compiled here calls such a method.
    """
    for method in vars(kind).values():
        if plain := getattr(method, "__wrapped__", None):
            setattr(plain, "__dynamo_disable", plain)


def plain_step(optimizer: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """An optimiser's step without torch's own wrapper, which loads the compiler to break its graphs there."""
    return torch.no_grad()(getattr(optimizer.step, "__wrapped__", optimizer.step))
