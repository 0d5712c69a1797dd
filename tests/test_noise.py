"""Every random number has an address."""

import torch

from ddpo import noise


def test_an_address_is_all_that_counts():
    a = noise.normal([(0, 1), (0, 2)], (4, 8, 8))
    assert torch.equal(a.flip(0), noise.normal([(0, 2), (0, 1)], (4, 8, 8)))
    assert torch.equal(a[:1], noise.normal([(0, 1)], (4, 8, 8)))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(a, noise.normal([(0, 1), (0, 2)], (4, 8, 8)))
    assert torch.equal(torch.get_rng_state(), before)  # the global stream is neither read nor moved


def test_addresses_do_not_run_together():
    rows = noise.normal([(1, 23), (12, 3), ("1", 23), (123,), (1, 2, 3)], (64,))
    assert len({tuple(r.tolist()) for r in rows}) == 5


def test_the_noise_is_standard_normal_within_and_across_addresses():
    draws = noise.normal([("many", i) for i in range(4000)], (16,)).double()
    assert abs(draws.mean()) < 0.02 and abs(draws.var() - 1) < 0.03
    first = draws[:, 0]
    assert abs(first.mean()) < 0.06 and abs(first.var() - 1) < 0.12
    assert abs(torch.corrcoef(torch.stack([first[:-1], first[1:]]))[0, 1]) < 0.06  # neighbours in address are strangers


def test_a_permutation_holds_everything_once():
    assert sorted(noise.permutation(50, "p", 1)) == list(range(50))
    assert noise.permutation(50, "p", 1) == noise.permutation(50, "p", 1) != noise.permutation(50, "p", 2)
