"""The bits of an exact step, and the kinds of machines that they depend on."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from small_digits import write_small_digits

from pipelines.config import DataConfig
from pipelines.index import build_index
from pipelines.reader import read_windows
from training.config import TrainConfig
from training.determinism import kind_differences, kind_of_machine, kind_warnings
from training.evaluation.evaluator import Sets
from training.gather import LocalGather, ProcessGroupGather
from training.metrics import read_metrics
from training.process import Worker
from training.selftest import exact_bits
from training.trainer import run_uri, train

_CPU = torch.device("cpu")
_OTHER = ("ATEN_CPU_CAPABILITY", "default")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """Ranks on a machine without this one's vector instructions, as far as torch knows."""
    monkeypatch.setenv(*_OTHER)
    ranks = Ranks()
    yield ranks
    ranks.close()


def _bits() -> str:
    return exact_bits(_CPU)


def _kind() -> dict[str, str]:
    return kind_of_machine(_CPU)


def _warnings() -> list[str]:
    return kind_warnings(ProcessGroupGather(), _CPU, None)


def test_the_bits_of_a_step_are_those_of_the_machine_whatever_its_threads(
    run_ranks: Callable, elsewhere: Ranks
) -> None:
    torch.set_num_threads(2)
    try:
        here = _bits()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert run_ranks(_bits, 2) == [here, here]
    assert elsewhere.run(_bits, 1) != [here]


def test_kinds_differ_by_what_differs(elsewhere: Ranks) -> None:
    here, (there,) = _kind(), elsewhere.run(_kind, 1)
    assert here["CPU"] in Path("/proc/cpuinfo").read_text()
    assert kind_differences(here, there) == [
        f"instructions {here['instructions']} and {there['instructions']}"
    ]
    assert kind_differences(here, {**here, "GPU": "H100"}) == ["GPU none and H100"]
    assert kind_differences(here, here) == []


def test_workers_on_other_kinds_of_machines_are_named_on_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks()
    assert ranks.run(_warnings, 1) == [[]]
    monkeypatch.setenv(*_OTHER)  # For the second rank, which starts now.
    first, second = ranks.run(_warnings, 2)
    ranks.close()
    assert first == second
    assert len(first) == 1
    assert "the workers' machines differ: instructions " in first[0]


def _train(config: TrainConfig, until: int | None = None) -> None:
    gather = ProcessGroupGather() if dist.is_initialized() else LocalGather()
    worker = Worker(gather=gather, device=_CPU, threads=1, tables=read_windows)
    sets = Sets.of(config, build_index(config.data.train, config.data), None)
    train(config, sets, worker, lambda _values: None, until=until)


def _said(config: TrainConfig) -> list[str]:
    lines = read_metrics(run_uri(config))
    return [line["warning"] for line in lines if "exact" in line.get("warning", "")]


def test_a_run_that_is_resumed_on_another_kind_of_machine_says_so(tmp_path: Path, elsewhere: Ranks) -> None:
    write_small_digits(tmp_path, 60)
    data = DataConfig(train=str(tmp_path / "train"), recipe="simclr-cifar", window_rows=12)
    config = TrainConfig(
        data=data, output=str(tmp_path), batch_size=8, lanes=4, steps=3, exact=True,
        encoder={"name": "resnet8"}, evaluation={"diagnostic_images": 0}, checkpoint={"every_steps": 1},
    )  # fmt: skip
    _train(config, 1)
    _train(config, 2)
    assert _said(config) == []
    elsewhere.run(_train, 1, config)
    (said,) = _said(config)
    assert "was saved on another kind of machine and may end with other bits: instructions " in said
