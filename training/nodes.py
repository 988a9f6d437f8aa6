"""The connected cluster's nodes: what they have, which are being drained, and which no longer answer."""

# Imported with channel.py by whoever runs its actor: nothing that takes seconds.
import socket
import time
from threading import Event
from typing import Any

import ray

_ANSWER_SECONDS, _LOOK_SECONDS = 2.0, 1.0

# How long a head may be away: one on this machine, one elsewhere. Once a driver touches what its lost raylet
# had of objects, Ray ends its process without a word: a second is too long here.
_LOCAL_SECONDS, _REMOTE_SECONDS = 0.1, 40.0


def draining_nodes() -> set[str]:
    """The ids of the nodes that their provider will take away soon, such as preempted ones."""
    draining = _told("get_draining_nodes")
    return set() if draining is None else set(draining)


def usable_resources() -> dict[str, float]:
    """What the cluster's nodes have, without those that are being drained."""
    leaving, total = draining_nodes(), dict[str, float]()
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in leaving:
            for name, amount in node["Resources"].items():
                total[name] = total.get(name, 0.0) + amount
    return total


def free_resources() -> list[dict[str, float]]:
    """What each of the cluster's nodes that are not being drained has to spare."""
    leaving, nodes = draining_nodes(), _told("available_resources_per_node")
    if nodes is None:
        return [dict(ray.available_resources())]
    return [has for node, has in nodes.items() if node not in leaving]


def _told(what: str) -> Any:
    """What Ray's private state tells; None where it no longer does.

    Then a node that is drained is one that will be lost, and the cluster is taken for one node: where what is
    free is spread too thin, workers wait for room until their start times out, and begin anew.
    """
    try:
        from ray._private.state import state

        return getattr(state, what)()
    except (ImportError, AttributeError):
        return None


def wait_for_lost_nodes(seconds: float, stop: Event) -> None:
    """Wait until Ray knows that each node which does not answer is lost; so long at most, or until `stop`.

    Ray counts on such a node until several of its looks in a row have failed.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(map(_answers, ray.nodes())):
        if stop.wait(_LOOK_SECONDS):
            return


class Head:
    """The cluster's head, and the node that this process is connected through.

    `answers` is whether both did when last asked.
    """

    def __init__(self) -> None:
        context = ray.get_runtime_context()
        self._node = here = context.get_node_id()
        host, _, port = context.gcs_address.rpartition(":")
        self._places = {(host.strip("[]"), int(port))}
        self._places |= {_place(node) for node in ray.nodes() if node["NodeID"] == here}
        # Since when they have not answered: this process may have been stopped for longer than that.
        self._silent_since: float | None = None
        self.answers = True
        # Elsewhere it may be started again, or the network be away. Ray's own processes wait for a minute.
        local = all(host.startswith("127.") or host == "::1" for host, _ in self._places)
        self._grace_seconds = _LOCAL_SECONDS if local else _REMOTE_SECONDS

    def lost(self) -> bool:
        """Whether it has not answered for a while; to be asked several times a second."""
        self.answers = all(map(_listens, self._places))
        if self.answers:
            self._silent_since = None
            return False
        self._silent_since = self._silent_since or time.monotonic()
        return time.monotonic() - self._silent_since > self._grace_seconds

    def given_up(self) -> bool:
        """Whether the head, which answers, says that this process's node is gone: it may still listen."""
        return not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == self._node)


def _answers(node: dict[str, Any]) -> bool:
    """Whether it does, or is known to be lost."""
    if not node["Alive"]:
        return True
    return _listens(_place(node))


def _place(node: dict[str, Any]) -> tuple[str, int]:
    return node["NodeManagerAddress"], node["NodeManagerPort"]


def _listens(place: tuple[str, int]) -> bool:
    try:
        socket.create_connection(place, _ANSWER_SECONDS).close()
    except OSError:
        return False
    return True
