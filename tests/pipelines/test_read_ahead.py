"""Without the names that Ray Data keeps private tables come all the same, read as far ahead as it likes."""

import pyarrow as pa
import pytest
from ray.data import DataContext
from ray.data._internal.execution import backpressure_policy, execution_callback

from pipelines.read_ahead import limit_read_ahead
from pipelines.stream import map_jobs


def _number(job: int) -> pa.Table:
    return pa.table({"number": [job]})


@pytest.mark.ray
@pytest.mark.parametrize(
    ("module", "name"),
    [(backpressure_policy, "BackpressurePolicy"), (execution_callback, "ExecutionCallback")],
)
def test_without_a_class_it_reads_as_ray_has_it(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    monkeypatch.delattr(module, name)
    context = DataContext()
    limit_read_ahead(context)
    assert context.custom_execution_callback_classes == []
    tables = list(map_jobs(range(6), _number, tasks=2))
    assert pa.concat_tables(tables)["number"].to_pylist() == [*range(6)]


def test_operators_and_executors_without_the_names_are_left_to_ray() -> None:
    context = DataContext()
    limit_read_ahead(context)
    *_, few_ahead = context.get_config(backpressure_policy.ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY)
    (pause,) = context.custom_execution_callback_classes
    assert few_ahead(context, {}, None).can_add_input(object()) is True
    pause().on_execution_step(object())
