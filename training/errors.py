"""What ends a step or a run before its time."""

import shlex
from collections.abc import Sequence


class StoppedError(Exception):
    """The run was asked to stop, and has saved what it has done."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


class UnsavedError(Exception):
    """No checkpoint can be written, or none may; another worker would meet the same."""


class NonFiniteError(Exception):
    """Several steps in a row had a loss or a gradient that is not finite."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__(f"the loss or its gradient is not finite in steps {first} to {last}")
        self.first, self.last = first, last


class NoRoomError(ValueError):
    """The cluster is too small for the workers; the message says what they need, and a way out."""


class RunError(Exception):
    """A worker failed; the message says which and why. `final`: it would again, whoever did the work.

    `died`: a worker's process has ended, and left no error.
    """

    def __init__(self, message: str, *, final: bool, died: bool = False) -> None:
        super().__init__(message)
        self.final, self.died = final, died


class ClusterLostError(RunError):
    """The head of the Ray cluster, or the node that this process is connected through, is gone.

    Where this process had started the cluster, its next call starts another. It can leave no other that was
    lost: its threads that wait for that would end it. `resume` is the command for another process, where
    there is one; `told`, whether stderr has the message already.
    """

    def __init__(self, resume: Sequence[str] = (), *, told: bool = False) -> None:
        message = "the head of the Ray cluster no longer answers"
        if resume:
            message = (
                f"the head of the Ray cluster no longer answers; resume with: diptych {shlex.join(resume)}"
            )
        super().__init__(message, final=True)
        self.resume, self.told = resume, told
