"""Batches of similar length."""

import numpy as np

from bert4rec_hf.training.sampler import SimilarLengthSampler


def test_batches_are_of_similar_length_and_every_epoch_has_every_row_in_an_order_of_its_own():
    lengths = np.random.default_rng(0).integers(1, 200, 1003)
    sampler = SimilarLengthSampler(lengths, 32, seed=0)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(1003))
        batches = lengths[orders[-1][: 1003 // 32 * 32]].reshape(-1, 32)
        assert batches.sum() / (batches.max(axis=1).sum() * 32) > 0.8  # a random order gives .51
    assert orders[0] == orders[2] != orders[1]
    assert list(SimilarLengthSampler(lengths, 32, seed=1)) != orders[0]
