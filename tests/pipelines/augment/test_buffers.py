"""Memory is reused once no tensor refers to it, and never before."""

import gc

import torch

from pipelines.augment.finisher import Buffers


def test_memory_is_used_again_once_no_tensor_has_it():
    buffers = Buffers()
    place = buffers.empty((4, 5)).data_ptr()
    gc.collect()
    assert buffers.empty((4, 5)).data_ptr() == place


def test_memory_that_a_part_of_a_tensor_still_has_is_not_lent_out():
    buffers = Buffers()
    part = buffers.empty((4, 5)).fill_(1)[1:3].permute(1, 0)
    gc.collect()
    buffers.empty((4, 5)).fill_(2)
    assert torch.equal(part, torch.ones(5, 2))


def test_a_smaller_tensor_fits_into_larger_memory_and_leaves_it_whole():
    buffers = Buffers()
    place = buffers.empty((4, 5)).data_ptr()
    gc.collect()
    smaller = buffers.empty((2, 5))
    assert (smaller.shape, smaller.data_ptr()) == ((2, 5), place)
    del smaller
    gc.collect()
    assert buffers.empty((4, 5)).data_ptr() == place
