"""Where fields of a config do not go together, what is said is that alone, and not the whole config."""

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import pytest
from pydantic import ValidationError

import pipelines.config
import training.config.encoder
import training.config.objective
import training.config.run
import tuning.config
from training.config import FinetuneConfig, TrainConfig
from training.config.messages import one_line, wrong_fields
from training.evaluation.finetune import finetune_config
from tuning.config import SearchConfig
from tuning.trial_config import trial_config

_DATA = {"train": "/images"}

# A training config's fields that do not go together, and how the line begins.
_TRAINING: list[tuple[dict[str, Any], str]] = [
    ({"data": _DATA | {"second_view": {"size": 64}}}, "view.size=224 and second_view.size=64: both views"),
    ({"data": _DATA | {"view": {"jitter": 0, "hue": 0.1}}}, "view: hue has no effect with jitter=0; "),
    ({"data": _DATA | {"window_bytes": 9, "window_rows": 9}}, "window_bytes=9 has no effect beside window_"),
    (
        {"objective": "supervised", "data": _DATA | {"second_view": {"jitter": 0.3}}},
        "data.second_view.jitter has no effect with objective=supervised, which trains on the first view",
    ),
    ({"optimizer": {"nesterov": True}}, "nesterov has no effect with optimizer.name=lars; leave it out"),
    ({"micro_batch_size": 100}, "micro_batch_size=100 must be a multiple of lanes=8 and divide batch_size"),
    ({"batch_size": 1}, "batch_size=1 leaves SimCLR no other image to compare an image with; try"),
    ({"batch_size": 1, "objective": "byol"}, "batch_size=1 gives batch norm a single image; try"),
    ({"lanes": 1, "micro_batch_size": 1}, "micro_batch_size=1 gives batch norm a single image; try"),
    ({"objective": "byol", "temperature": 0.2}, "temperature has no effect with objective=byol; leave it"),
    ({"objective_options": {"a": 1}}, "objective_options has no effect with objective=simclr; leave it out"),
    ({"exact": True, "objective": "own:Objective"}, "exact=true is for simclr, byol and supervised, and obj"),
    ({"exact": True, "compile": True}, "compile=true does not keep the bits of exact=true; leave one of"),
    ({"exact": True, "precision": "bfloat16"}, "exact=true needs precision=float32, got precision=bfloat16"),
    ({"encoder": {"name": "resnet20", "stem": "cifar"}}, "encoder.stem has no effect on resnet20; leave it"),
    ({"encoder": {"name": "resnet50", "width": 1.5}}, "encoder.width=1.5 on resnet50 must be whole; try 1"),
    ({"encoder": {"name": "efficientnet", "alpha": 1.2, "depth": 2}}, "encoder.alpha and encoder.depth both"),
    ({"encoder": {"name": "efficientnet", "phi": 2}}, "encoder.phi has no effect without alpha, beta or"),
    ({"encoder": {"name": "efficientnet", "base_size": 64}}, "encoder.base_size has no effect without"),
    ({"encoder": {"name": "efficientnet", "gamma": 1.3}}, "encoder.gamma asks for views of 291 pixels, and"),
]  # fmt: skip

_SPACE = {"temperature": {"uniform": [0.1, 0.5]}}
_EACH = {"evaluation": {"every_epochs": 1}}

# The same for a search's.
_SEARCHES: list[tuple[dict[str, Any], str]] = [
    ({"train": {"data": _DATA | {"test": "/tests"}}}, "train.data.test: a search never sees the test images"),
    ({"train": {"evaluation": {"held_out": 0.1}}}, "train.evaluation.held_out: a search has its own"),
    ({"train": {}}, "scheduler=asha needs evaluations to look at; set train.evaluation.every_epochs"),
    ({"searcher": "grid", "compound": True}, "compound=true has no grid of values; set searcher to random"),
    ({"searcher": "grid"}, "searcher=grid tries all values, and temperature is uniform; give it choice"),
    ({"space": {"batch_size": {"choice": [100]}}}, "space: batch_size=100: batch_size=100 must be a"),
    ({"space": {}}, "the search space is empty; give a key such as"),
]  # fmt: skip


def _training(fields: dict[str, Any]) -> TrainConfig:
    return TrainConfig(**{"data": _DATA, **fields})


def _search(fields: dict[str, Any]) -> SearchConfig:
    given = {"space": _SPACE, "train": _EACH, **fields}
    return SearchConfig(**{**given, "train": {"data": _DATA, **given["train"]}})


def _line(make: Callable[[], object]) -> str:
    with pytest.raises(ValidationError) as refused:
        make()
    assert one_line(refused.value) == wrong_fields(refused.value)
    return wrong_fields(refused.value)


@pytest.mark.parametrize(("fields", "said"), _TRAINING)
def test_a_training_config_says_what_does_not_go_together_alone(fields: dict[str, Any], said: str) -> None:
    for make in (partial(_training, fields), partial(_search, {"train": fields})):
        line = _line(make)
        assert line.startswith(said)
        assert "ArgsKwargs" not in line
        assert "every_steps" not in line


@pytest.mark.parametrize(("fields", "said"), _SEARCHES)
def test_a_search_says_what_does_not_go_together_alone(fields: dict[str, Any], said: str) -> None:
    line = _line(lambda: _search(fields))
    assert line.startswith(said)
    assert "ArgsKwargs" not in line
    assert "every_steps" not in line


# Functions of those modules that look at one field, or are no part of a config's own check.
_OF_ONE_FIELD = {
    "_recipe_name", "_checked_workers", "_objective_name", "_checked_name", "_metric", "_scheduler",
    "_ascending", "_at_most_one", "_within_a_turn", "efficientnet_resolution", "worker_counts",
    "shipped_config",
}  # fmt: skip


def _messages(module: ModuleType) -> Iterator[str]:
    """As regular expressions, what a config's checks say."""
    for function in ast.walk(ast.parse(inspect.getsource(module))):
        if not isinstance(function, ast.FunctionDef) or function.name in _OF_ONE_FIELD:
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                (text,) = node.exc.args
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                yield "".join(
                    re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".*" for part in parts
                )


def test_every_check_of_several_fields_is_among_the_cases() -> None:
    said = [_line(partial(_training, fields)) for fields, _ in _TRAINING]
    said += [_line(partial(_search, fields)) for fields, _ in _SEARCHES]
    modules = (
        pipelines.config, training.config.run, training.config.encoder, training.config.objective,
        tuning.config,
    )  # fmt: skip
    known = [message for module in modules for message in _messages(module)]
    assert len(known) > 20
    assert not [message for message in known if not any(re.fullmatch(message, line) for line in said)]


def test_a_field_that_is_wrong_by_itself_is_named_with_its_value() -> None:
    line = _line(partial(_training, {"temperature": -1.0}))
    assert line.startswith("temperature=-1.0: Input should be greater than")
    line = _line(lambda: _search({"train": {"data": _DATA | {"view": {"crop_scale": [1, 0.5]}}}}))
    assert line.startswith("train.data.view.crop_scale=[1, 0.5]: needs two numbers")


def test_fine_tunings_and_trials_that_cannot_be_say_so_alone() -> None:
    run = _training({"lanes": 1})
    settings = FinetuneConfig(batch_size=1)
    line = _line(lambda: finetune_config(run, "/c.pt", settings, share=1.0, images=99, classes=3))
    assert line == "batch_size=1 gives batch norm a single image; try --batch-size 2"
    space = {"optimizer.nesterov": {"choice": [False, True]}, "optimizer.name": {"choice": ["sgd", "lars"]}}
    search = _search({"space": space, "train": _EACH | {"optimizer": {"name": "sgd"}}})
    line = _line(lambda: trial_config(search, {"optimizer.nesterov": True, "optimizer.name": "lars"}))
    assert line == "nesterov has no effect with optimizer.name=lars; leave it out"
