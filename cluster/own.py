"""The files of an objective of the user's own, which every worker must be able to import."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from training.objective_config import Option, is_own
from training.objectives import Objective
from training.own_objective import find_own, source_of


def own_modules(objective: str, options: Mapping[str, Option] | None = None) -> list[Path]:
    """The file or package of MODULE:CLASS, where it is not installed; none for other objectives.

    It is looked for in the folder at hand too. Raises ValueError where it will not do, or does not take the
    options, where they are known.
    """
    if not is_own(objective):
        return []
    if (here := os.getcwd()) not in sys.path:  # As `python -m` has it.
        sys.path.insert(0, here)
    if options is not None:
        find_own(Objective, objective, options)
    source = source_of(objective)
    return [source] if source else []
