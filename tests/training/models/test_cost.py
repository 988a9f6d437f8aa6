"""An encoder's cost, counted with and without arithmetic."""

from training.config.encoder import EncoderConfig
from training.models.encoders import encoder_cost


def test_a_cost_is_the_same_with_and_without_arithmetic() -> None:
    for name in ("resnet8", "efficientnet-b0"):
        config = EncoderConfig(name=name)
        assert encoder_cost(config, 64, "cpu") == encoder_cost(config, 64)
