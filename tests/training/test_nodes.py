"""A Ray that no longer tells what its private state does: no node is known to be drained, and all are one."""

import pytest
import ray
from ray._private.state import GlobalState

from training.nodes import draining_nodes, free_resources

pytestmark = pytest.mark.ray


def test_each_node_has_what_the_cluster_has_of_one_node(ray_cluster: None) -> None:
    (node,) = free_resources()
    assert node["CPU"] == pytest.approx(ray.available_resources()["CPU"])


@pytest.mark.parametrize("name", ["get_draining_nodes", "available_resources_per_node"])
def test_without_a_name_the_cluster_is_taken_as_it_is_told_publicly(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delattr(GlobalState, name)
    assert draining_nodes() == set()
    assert sum(node["CPU"] for node in free_resources()) == pytest.approx(ray.available_resources()["CPU"])
