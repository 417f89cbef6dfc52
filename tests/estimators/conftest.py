"""Problems whose meta-gradient is known, in float64."""

import pytest

from metalearn.optim.first_order import SGD
from metalearn.problems.hyperparameters import Ridge
from metalearn.random import key, normal

DIMENSION = 6


def ridge(horizon=None, lr=0.3, dimension=DIMENSION, rule=None, seed=0):
    """Ridge with random rows and penalties around e^-1: (problem, meta)."""
    x, xv = (normal(key(seed, name), (40, dimension)).double() for name in ("x", "x_validation"))
    w, noise = normal(key(seed, "w"), (dimension,)).double(), normal(key(seed, "noise"), (2, 40)).double()
    problem = Ridge(x, x @ w + noise[0], xv, xv @ w + noise[1], rule or SGD(lr), horizon)
    return problem, {"log_penalty": normal(key(seed, "meta"), (dimension,)).double() * 0.5 - 1}


@pytest.fixture
def ridge_problem():
    return ridge()


def relative(found, wanted):
    """|found - wanted| / |wanted| over all entries of two dictionaries."""
    difference = sum((found[n] - wanted[n]).square().sum() for n in wanted)
    return float((difference / sum(v.square().sum() for v in wanted.values())).sqrt())


def estimate(estimator, problem, meta, steps, seed=0):
    """One estimate from a fresh state: a ``MetaGradient``."""
    k = key(seed)
    state = estimator.init(problem, meta, k)
    return estimator.estimate(problem, meta, state, problem.batches(k, steps), k)


@pytest.fixture
def quick_estimate():
    return estimate
