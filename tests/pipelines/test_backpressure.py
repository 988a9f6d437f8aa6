"""Without its private names, Ray Data still works, without a limit on reading ahead."""

import pytest
from ray.data import DataContext
from ray.data._internal.execution import backpressure_policy, execution_callback

from pipelines.stream import limit_read_ahead

_POLICIES = backpressure_policy.ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (backpressure_policy, "BackpressurePolicy"),
        (backpressure_policy, "ENABLED_BACKPRESSURE_POLICIES"),
        (execution_callback, "ExecutionCallback"),
    ],
)
def test_where_a_class_is_gone_its_settings_are_as_ray_has_them(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    context = DataContext()
    monkeypatch.delattr(module, name)
    limit_read_ahead(context)
    assert context.custom_execution_callback_classes == []
    assert context.get_config(_POLICIES) is None


def test_operators_and_executors_without_the_names_are_left_to_ray() -> None:
    context = DataContext()
    limit_read_ahead(context)
    *_, few_ahead = context.get_config(_POLICIES)
    (pause,) = context.custom_execution_callback_classes
    assert few_ahead(context, {}, None).can_add_input(object()) is True
    pause().on_execution_step(object())
