"""A mixture's estimate against those of its problems; families of sampled sizes."""

import functools

import pytest
import torch
from problems.conftest import Clusters, opened
from problems.learned_rules import Scaled

from metalearn import random, tree
from metalearn.base import Batches
from metalearn.estimators.evolution import NoiseReuseES
from metalearn.estimators.unrolled import Unrolled
from metalearn.models.vision import MLP
from metalearn.problems.comparison import compare
from metalearn.problems.mixture import Mixture, OptimizeeFamily, OverMixture
from metalearn.problems.optimizees import Optimizee


def mixture():
    rule = Scaled()
    return opened(
        Mixture([Optimizee(Clusters(), functools.partial(MLP, hidden=(n,)), rule, horizon=6) for n in (3, 5)])
    )


@pytest.mark.parametrize("estimator", [NoiseReuseES(pairs=4), Unrolled(warm_start=True)], ids=["nres", "unrolled"])
def test_the_estimate_is_the_mean_of_the_problems_own(estimator):
    """Over two windows, so that each problem's own state is carried on."""
    problem, over = mixture(), OverMixture(estimator)
    meta, key = problem.init_meta(random.key(0)), random.key(1)
    state = over.init(problem, meta, key)
    own = [estimator.init(each, meta, random.fold(key, n)) for n, each in enumerate(problem.problems)]
    for window in range(2):
        key = random.key(window)
        found = over.estimate(problem, meta, state, problem.batches(key, 3), key)
        single = [
            estimator.estimate(each, meta, own[n], Batches(lambda k: None, None, 3), random.fold(key, n))
            for n, each in enumerate(problem.problems)
        ]
        wanted = torch.stack([each.grad["log_rate"] for each in single]).mean()
        torch.testing.assert_close(found.grad["log_rate"], wanted)
        torch.testing.assert_close(found.loss, torch.stack([each.loss for each in single]).mean())
        state, own = found.state, [each.state for each in single]
    torch.testing.assert_close(tree.pack(state), tree.pack({str(n): each for n, each in enumerate(own)}))


def test_families_have_unlike_sizes_and_are_the_same_again():
    make = functools.partial(OptimizeeFamily, Clusters(), Scaled(), groups=6, depths=(0, 1, 2))
    first, second, other = make(), make(), make(family_seed=1)
    assert first.configurations == second.configurations != other.configurations
    assert len({str(each) for each in first.configurations}) > 2
    opened(first)
    for each, configuration in zip(first.problems, first.configurations, strict=True):
        layers = [part for part in each.module if isinstance(part, torch.nn.Linear)]
        assert [layer.out_features for layer in layers] == [*configuration["hidden"], 3]
        assert each.num_drawn == configuration["batch_size"]


def test_families_have_the_lengths_that_they_are_given_and_are_judged_by_their_horizon():
    family = opened(OptimizeeFamily(Clusters(), Scaled(), horizon=12, groups=2, shortest=4, multiple_of=2))
    for each in family.problems:
        assert (each.shortest, each.multiple_of, each.nominal_horizon, each.horizon) == (4, 2, 12, 12)
    meta, keys = family.init_meta(random.key(0)), random.fold(random.key(1), torch.arange(2))
    found = compare(family.problems, meta, tuning=keys, judging=keys, part="validation")
    assert len(found.rows) == 2 * 4 * 12


def test_refuses_what_cannot_be_mixed():
    with pytest.raises(ValueError, match="number of problems is 0"):
        Mixture([])
    with pytest.raises(ValueError, match="widths is 0"):
        OptimizeeFamily(Clusters(), Scaled(), widths=(0, 4))
    with pytest.raises(ValueError, match="activations is 'sin'"):
        OptimizeeFamily(Clusters(), Scaled(), activations=("sin",))
    assert "no mixture" in OverMixture(Unrolled()).refusal(mixture().problems[0])
