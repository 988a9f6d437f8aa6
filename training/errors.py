"""Exceptions that end a step or a run early."""

import shlex
from collections.abc import Sequence


class StoppedError(Exception):
    """The run was asked to stop, and has saved its work."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


class UnsavedError(Exception):
    """No checkpoint can or may be written; another worker would fail in the same way."""


class NonFiniteError(Exception):
    """Several steps in a row had a loss or a gradient that is not finite."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__(f"the loss or its gradient is not finite in steps {first} to {last}")
        self.first, self.last = first, last


class NoRoomError(ValueError):
    """The cluster is too small for the workers; the message says what they need and what to do."""


class RunError(Exception):
    """A worker failed; the message says which and why.

    final: another worker would fail in the same way. died: a worker's process ended without an error.
    """

    def __init__(self, message: str, *, final: bool, died: bool = False) -> None:
        super().__init__(message)
        self.final, self.died = final, died


class ClusterLostError(RunError):
    """The head of the Ray cluster, or the node that this process is connected through, is gone.

    If this process started the cluster, its next call starts another. From any other lost cluster it cannot
    disconnect: threads that still wait for the cluster would end the process. resume: the command with which
    another process resumes, if there is one. told: stderr already has the message.
    """

    def __init__(self, resume: Sequence[str] = (), *, told: bool = False) -> None:
        message = "the head of the Ray cluster no longer answers"
        if resume:
            message = (
                f"the head of the Ray cluster no longer answers; resume with: diptych {shlex.join(resume)}"
            )
        super().__init__(message, final=True)
        self.resume, self.told = resume, told
