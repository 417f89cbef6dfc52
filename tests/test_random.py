"""random.py against its definition, its laws, and the promises about shapes, vmap and order."""

import math

import pytest
import torch
from scipy import stats

from metalearn import random


def splitmix64(state: int, count: int) -> list[int]:
    """SplitMix64 in Python integers, as published."""
    words = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        words.append(z ^ (z >> 31))
    return words


@pytest.mark.parametrize("state", [0, 1234567, 2**63 + 17])
def test_matches_splitmix64_in_python_integers(state):
    signed = state - 2**64 if state >= 2**63 else state
    drawn = random.bits(torch.tensor(signed), 100)
    assert [word % 2**64 for word in drawn.tolist()] == splitmix64(state, 100)


def test_normal_has_the_law_of_independent_normals():
    rows = random.normal(random.fold(random.key(0), torch.arange(64)), (4096,))
    assert stats.kstest(rows.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(stats.kurtosis(rows.flatten().numpy())) < 0.05
    correlation = torch.corrcoef(rows) - torch.eye(64)
    assert correlation.abs().max() < 5 / math.sqrt(4096)
    within = rows[:, ::2] * rows[:, 1::2]  # the two halves of each 64-bit word
    assert abs(within.mean()) < 5 / math.sqrt(within.numel())


def test_uniform_and_integers_have_their_laws():
    keys = random.fold(random.key(3, "law"), torch.arange(50))
    assert stats.kstest(random.uniform(keys, (1000,)).flatten().numpy(), "uniform").pvalue > 1e-3
    counts = torch.bincount(random.integers(keys, (1000,), 7).flatten(), minlength=7)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("count", "high"), [(5, 5), (32, 720), (100, 60_000), (1, 2**31), (3, 89)])
def test_distinct_integers_differ_and_are_uniform(count, high):
    drawn = random.distinct(random.fold(random.key(1), torch.arange(2000)), count, high)
    assert drawn.min() >= 0 and drawn.max() < high
    assert all(len(set(row)) == count for row in drawn.tolist())
    bins = max(d for d in range(1, 90) if high % d == 0)
    counts = torch.bincount(drawn.flatten() * bins // high, minlength=bins).numpy()
    if count < high:
        assert stats.chisquare(counts).pvalue > 1e-3


def test_permutations_are_uniform():
    orders = random.permutation(random.fold(random.key(5), torch.arange(24_000)), 4)
    _, counts = orders.unique(dim=0, return_counts=True)
    assert len(counts) == 24 and stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_a_row_depends_on_its_own_key_alone_and_vmap_agrees():
    keys = random.fold(random.key(9), torch.arange(6))
    together = random.normal(keys, (3, 5))
    assert torch.equal(together[4], random.normal(keys[4], (3, 5)))
    assert torch.equal(torch.vmap(lambda k: random.normal(k, (3, 5)))(keys), together)
    assert torch.equal(torch.vmap(lambda k: random.distinct(k, 8, 500))(keys), random.distinct(keys, 8, 500))


def test_labels_and_seeds_give_different_keys():
    paths = [
        random.key(s, *labels) for s in (0, 1, -1, 2**62) for labels in ((), ("a",), ("b",), ("a", 0), (0, "a"), (1,))
    ]
    assert len({int(k) for k in paths}) == len(paths)


def test_a_key_is_the_same_made_on_the_host_or_by_tensors():
    stepwise = random.fold(random.key(5), "images", torch.tensor([3, -7]), 2**62)
    assert stepwise.tolist() == [int(random.key(5, "images", n, 2**62)) for n in (3, -7)]


def test_keys_are_not_changed_by_use():
    parent = random.key(2)
    before = parent.clone()
    random.fold(parent, 1, torch.arange(3))
    random.normal(parent, (4,))
    assert torch.equal(parent, before)


@pytest.mark.parametrize("high", [0, -1, 2**31 + 1])
def test_refuses_a_range_it_cannot_draw_from(high):
    with pytest.raises(ValueError, match=str(high)):
        random.integers(random.key(0), (2,), high)


@pytest.mark.parametrize("cut", [0.5, 2.0])
def test_truncated_normals_follow_their_law(cut):
    values = random.truncated_normal(random.key(0), (20_000,), cut)
    assert values.abs().max() <= cut + 1e-6
    assert stats.kstest(values.double().numpy(), stats.truncnorm(-cut, cut).cdf).pvalue > 0.01


def test_integers_below_bounds_of_their_own_match_one_by_one():
    keys, high = random.fold(random.key(0), torch.arange(12)).view(4, 3), torch.tensor([[1], [7], [1000], [2**31]])
    drawn = random.integers(keys, (50,), high)
    for m, bound in enumerate(high.flatten().tolist()):
        assert torch.equal(drawn[m], random.integers(keys[m], (50,), bound))


def test_refuses_more_different_integers_than_there_are():
    with pytest.raises(ValueError, match="count = 4 different integers below high = 3"):
        random.distinct(random.key(0), 4, 3)


@pytest.mark.gpu
def test_is_the_same_on_the_gpu():
    keys = random.fold(random.key(0), torch.arange(8))
    assert torch.equal(random.bits(keys, 1000), random.bits(keys.cuda(), 1000).cpu())
    torch.testing.assert_close(
        random.normal(keys, (1000,)), random.normal(keys.cuda(), (1000,)).cpu(), rtol=1e-5, atol=1e-6
    )


def test_a_single_number_of_a_single_key_is_a_scalar():
    one = random.key(0)
    numbers = random.uniform(one), random.normal(one), random.integers(one, (), 5)
    assert all(number.shape == () for number in numbers)
