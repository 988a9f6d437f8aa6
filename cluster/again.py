"""A command whose own Ray cluster has lost its head makes way for one that resumes it, on another."""

import os
import sys
import time

from training.faults import ClusterLostError

# How often in a row; the environment is all that the next command has of this one.
_TIMES, _IN_A_ROW_SECONDS, _COUNTED = 3, 600.0, "DIPTYCH_LOST_HEADS"


def after_lost_head(lost: ClusterLostError) -> None:
    """Run the command that resumes the work in this process's place; else say how, and end it with code 1."""
    count, _, at = os.environ.get(_COUNTED, "0 0").partition(" ")
    times = 1 if time.time() - float(at) > _IN_A_ROW_SECONDS else int(count) + 1
    again = lost.own and bool(lost.resume) and times <= _TIMES
    told = "the head of the Ray cluster no longer answers; starting another" if again else str(lost)
    print(f"diptych: {told}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if again:
        os.environ[_COUNTED] = f"{times} {time.time():.0f}"
        os.execv(sys.executable, [sys.executable, "-m", "cluster", *lost.resume])
    # Without Ray's own way to end, which waits for the cluster.
    os._exit(1)
