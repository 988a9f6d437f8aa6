"""Which rows are skipped: by their own pixels, as often as asked, and the mean stays."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from training.config.encoder import EncoderConfig
from training.gather import LocalGather, ProcessGroupGather
from training.models.batch_norm import synchronize_batch_norm
from training.models.efficientnet import row_keys, skip_rows
from training.models.encoders import build_encoder


def _images(rows: int, size: int = 24) -> torch.Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(0))


def _kept(keys: torch.Tensor, block: int, probability: float) -> torch.Tensor:
    return skip_rows(torch.ones(len(keys), 1, 1, 1), keys, block, probability).flatten() > 0


def test_a_rows_key_does_not_depend_on_the_rows_beside_it_nor_on_the_memory_format() -> None:
    images = _images(12)
    keys = row_keys(images)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(row_keys(images[order]), keys[order])
    assert torch.equal(row_keys(images[3:5]), keys[3:5])
    assert torch.equal(row_keys(images.to(memory_format=torch.channels_last)), keys)


@pytest.mark.parametrize("size", [8, 24, 224])
def test_views_that_differ_in_one_seen_pixel_have_other_keys(size: int) -> None:
    images = _images(2, size)
    images[1] = images[0]
    assert len(set(row_keys(images).tolist())) == 1
    images[1, 2, 0, 0] += 1e-3
    assert len(set(row_keys(images).tolist())) == 2


@pytest.mark.parametrize("probability", [0.05, 0.2, 0.7])
def test_rows_are_skipped_as_often_as_asked_in_every_block(probability: float) -> None:
    keys = row_keys(_images(4000, 8))
    deviation = (probability * (1 - probability) / 4000) ** 0.5
    for block in (0, 1, 15):
        skipped = 1 - _kept(keys, block, probability).double().mean().item()
        assert skipped == pytest.approx(probability, abs=4 * deviation)


def test_blocks_skip_independently() -> None:
    keys = row_keys(_images(4000, 8))
    kept = torch.stack([_kept(keys, block, 0.5) for block in range(16)]).double()
    correlations = torch.corrcoef(kept) - torch.eye(16)
    assert correlations.abs().max() < 5 / 4000**0.5


def test_rows_that_stay_make_up_for_those_that_do_not() -> None:
    branch = torch.rand(64, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    keys = row_keys(_images(64))
    out = skip_rows(branch, keys, 3, 0.25)
    kept = _kept(keys, 3, 0.25)
    torch.testing.assert_close(out[kept], branch[kept] / 0.75)
    assert not out[~kept].any()
    assert 0 < kept.sum() < 64


def _features(drop_path: float) -> torch.Tensor:
    """Of this rank's share of eight images, while training."""
    torch.manual_seed(0)
    gather = ProcessGroupGather() if dist.is_initialized() else LocalGather()
    config = EncoderConfig(name="efficientnet", depth=0.5, width=0.3, drop_path=drop_path)
    encoder = build_encoder(config).double()
    synchronize_batch_norm(encoder, gather)
    torch.manual_seed(gather.rank)  # No generator has a say.
    return encoder(_images(8, 64).double().chunk(gather.world_size)[gather.rank]).detach()


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_same_rows_are_skipped_on_any_number_of_workers(world_size: int, run_ranks: Callable) -> None:
    alone = _features(0.5)
    assert not torch.allclose(alone, _features(0.0))
    together = torch.cat(run_ranks(_features, world_size, 0.5))
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
