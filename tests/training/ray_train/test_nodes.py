"""A Ray that no longer tells what its private state does: no node is known to be drained, and all are one."""

import sys

import pytest
import ray
from ray._private.state import GlobalState

from training.ray_train.nodes import draining_nodes, free_resources

pytestmark = pytest.mark.ray


def test_each_node_has_what_the_cluster_has_of_one_node(ray_cluster: None) -> None:
    (node,) = free_resources()
    assert node["CPU"] == pytest.approx(ray.available_resources()["CPU"])


def test_without_it_the_cluster_is_as_it_is_told_publicly(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray._private.state", None)
    assert draining_nodes() == set()
    assert free_resources() == [ray.available_resources()]


def test_where_only_the_names_in_it_are_gone_none_is_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(GlobalState, "get_draining_nodes")
    assert draining_nodes() == set()
