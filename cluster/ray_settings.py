"""Settings of the Ray clusters that diptych starts."""

LOOPBACK = "127.0.0.1"

# Ray reads this as it is imported: then it takes the loopback address for a node's own, and listens there
# alone.
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

# Ray reads these as it is imported. It is not to print among a command's lines what they say already, as
# "worker 1 failed"; and a thread that does not know yet that its cluster is gone is not to start another.
AT_IMPORT = {
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed while executing a task",
    "RAY_ENABLE_AUTO_CONNECT": "0",
}

# Ray ends processes that were idle for a second where there are more than cores. The readers are, between
# two windows, and starting one takes as long as it reads some thousand images. Ray's nodes read this as they
# start.
IDLE_STAY = {"RAY_num_workers_soft_limit": "64"}


def wants_token(there: str) -> str:
    """What a user is told whom a cluster has turned away."""
    return (
        f"the Ray cluster at {there} wants its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH "
        "unless it is in ~/.ray/auth_token"
    )
