"""The connected cluster's nodes: what they have, which are being drained, and which no longer answer."""

# Imported with channel.py by whoever runs its actor: nothing that takes seconds.
import socket
import time
from threading import Event
from typing import Any

import ray
from ray._private.state import state

_ANSWER_SECONDS, _LOOK_SECONDS = 2.0, 1.0


def draining_nodes() -> set[str]:
    """The ids of the nodes that their provider will take away soon, such as preempted ones."""
    return set(state.get_draining_nodes())


def usable_resources() -> dict[str, float]:
    """What the cluster's nodes have, without those that are being drained."""
    leaving, total = draining_nodes(), dict[str, float]()
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in leaving:
            for name, amount in node["Resources"].items():
                total[name] = total.get(name, 0.0) + amount
    return total


def wait_for_lost_nodes(seconds: float, stop: Event) -> None:
    """Wait until Ray knows that each node which does not answer is lost; so long at most, or until `stop`.

    Ray counts on such a node until several of its looks in a row have failed.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(map(_answers, ray.nodes())):
        if stop.wait(_LOOK_SECONDS):
            return


def _answers(node: dict[str, Any]) -> bool:
    """Whether it does, or is known to be lost."""
    if not node["Alive"]:
        return True
    try:
        socket.create_connection(
            (node["NodeManagerAddress"], node["NodeManagerPort"]), _ANSWER_SECONDS
        ).close()
    except OSError:
        return False
    return True
