"""DALI's conversion of the graph's code."""

from typing import Any

import pytest
from nvidia.dali import fn, pipeline_def


@pipeline_def(enable_conditionals=True)
def _beyond_conversion() -> Any:
    for _ in range(1):
        pass
    else:
        pass
    return fn.random.coin_flip()


def test_a_graph_that_dali_cannot_convert_is_an_error():
    # DALI would log it once and go on with code whose conditions see no samples.
    with pytest.raises(AssertionError, match="could not transform"):
        _beyond_conversion(batch_size=1, num_threads=1, device_id=None)
