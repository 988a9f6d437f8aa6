"""How far ahead Ray Data reads, by names that Ray keeps private; without them it is as far as Ray has it."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from ray.data import DataContext

_PAUSE_SECONDS = 0.05

Answer = TypeVar("Answer")


def limit_read_ahead(context: DataContext) -> None:
    """Let a pool of tasks or actors be ahead of what is taken by twice its size, and rest where it is.

    Else all would be read that the object store has room for: in a burst that takes the cores from the
    training, and into memory that is always fresh. And Ray Data's scheduler, a thread of this process, has
    nothing to wait for while nobody takes what has been read, and goes round and round: that took 0.9 of a
    core, and Python's lock, from the training beside it.
    """
    try:
        from ray.data._internal.execution.backpressure_policy import (
            ENABLED_BACKPRESSURE_POLICIES,
            ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
            BackpressurePolicy,
        )
        from ray.data._internal.execution.execution_callback import ExecutionCallback
    except ImportError:
        return

    class FewAhead(BackpressurePolicy):
        def can_add_input(self, op: Any) -> bool:
            return _unless_gone(lambda: _few_wait(self._topology, op), True)

    class Pause(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:
            if _unless_gone(lambda: _nothing_to_do(executor), False):
                time.sleep(_PAUSE_SECONDS)

    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, FewAhead])
    context.custom_execution_callback_classes = [Pause]


def _few_wait(topology: Any, operator: Any) -> bool:
    most = operator.get_max_concurrency_limit()
    if most is None:
        return True
    waiting = operator.internal_output_queue_num_blocks() + len(topology[operator].output_queue)
    return operator.num_active_tasks() + waiting < 2 * most


def _nothing_to_do(executor: Any) -> bool:
    operators = executor._topology or {}
    busy = any(op.num_active_tasks() and not op._in_task_output_backpressure for op in operators)
    return not busy and not executor._consumer_idling()


def _unless_gone(ask: Callable[[], Answer], otherwise: Answer) -> Answer:
    """What `ask` gives; `otherwise` where the names that it needs are Ray's no longer, or others."""
    try:
        return ask()
    except (AttributeError, KeyError, TypeError):
        return otherwise
