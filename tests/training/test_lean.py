"""What every worker and every report does loads nothing of torch's compiler."""

import subprocess
import sys

import pytest

from training.cost import encoder_cost
from training.encoder_config import EncoderConfig

_STEP = """
import torch
from training.config import OptimizerConfig
from training.optimizers import build_optimizer
model = torch.nn.Linear(2, 2)
optimizer = build_optimizer(model, OptimizerConfig(name="{name}"))
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
"""

_COST = """
from training.cost import encoder_cost
from training.encoder_config import EncoderConfig
encoder_cost(EncoderConfig(name="{name}"), 32, "cpu")
"""


@pytest.mark.parametrize(
    "script",
    [_STEP.format(name=name) for name in ("lars", "sgd", "adamw")] + [_COST.format(name="resnet8")],
    ids=["lars", "sgd", "adamw", "cost"],
)
def test_the_compiler_is_not_loaded(script: str) -> None:
    ending = "\nimport sys\nsys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script + ending]).returncode == 0


def test_a_cost_is_the_same_with_and_without_arithmetic() -> None:
    for name in ("resnet8", "efficientnet-b0"):
        config = EncoderConfig(name=name)
        assert encoder_cost(config, 64, "cpu") == encoder_cost(config, 64)
