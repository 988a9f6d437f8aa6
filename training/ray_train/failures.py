"""Why a group of workers failed, as one error of the run."""

import re

from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import ControllerError, WorkerGroupError

from pipelines import storage
from training.config import TrainConfig
from training.errors import RunError, StoppedError, UnsavedError
from training.trainer import run_uri

# Errors of the config or the code, which any other worker would raise too.
_FINAL_ERRORS = (
    ValueError,
    TypeError,
    NameError,
    AttributeError,
    LookupError,
    ImportError,
    AssertionError,
)


def failure(config: TrainConfig, error: WorkerGroupError) -> Exception:
    """The error to raise: one of the run itself, if there is one, rather than one of its workers."""
    causes = {rank: root_error(failure) for rank, failure in sorted(error.worker_failures.items())}
    for cause in causes.values():
        if isinstance(cause, StoppedError):
            return cause
        if isinstance(cause, UnsavedError):
            return RunError(f"{cause}", final=True)
    final = [rank for rank, cause in causes.items() if isinstance(cause, _FINAL_ERRORS)]
    rank = final[0] if final else next(iter(causes))
    cause = causes[rank]
    message = f"worker {rank} failed: {described(cause)} ({_traceback_place(config, error)})"
    died = any(isinstance(cause, RayActorError | OutOfMemoryError) for cause in causes.values())
    return RunError(message, final=bool(final), died=died)


def not_started(error: ControllerError) -> RunError:
    """The error to raise if Ray Train could not start the workers."""
    cause = root_error(error)
    # A ValueError, such as for a wrong address of a node, would come again.
    return RunError(
        f"the workers could not be started: {described(cause)}", final=isinstance(cause, ValueError)
    )


def _traceback_place(config: TrainConfig, error: WorkerGroupError) -> str:
    """Write the traceback and return its place, or why it cannot be written: that must not hide the cause."""
    log = storage.join(run_uri(config), "error.log")
    try:
        storage.write(log, str(error).encode())
    except OSError as refused:
        return f"no traceback: {storage.first_line(refused)}"
    return f"traceback: {log}"


def root_error(error: BaseException) -> BaseException:
    """The innermost cause of an error of Ray's."""
    names = ("cause", "controller_failure", "health_check_failure", "__cause__")
    while cause := next((found for name in names if (found := getattr(error, name, None))), None):
        error = cause
    return error


def described(error: BaseException) -> str:
    """The error in one line."""
    if isinstance(error, OutOfMemoryError):  # Ray's message is a page long.
        used = re.search(r"was (\S+) used / (\S+) limit", str(error))
        of = f", {used[1]} of {used[2]} being used" if used else ""
        return (
            f"Ray ended it because its node ran out of memory{of}; use nodes with more, a smaller "
            "--data.window-bytes or --micro-batch-size"
        )
    return f"{type(error).__name__}: {storage.first_line(error)}"
