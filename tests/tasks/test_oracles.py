"""Oracles against scikit-learn, sequence by sequence."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier

from metalearn.tasks.oracles import logistic_regression, nearest_neighbour, oracles, ridge

POSITIONS = (0, 1, 2, 5, 11)
ORACLES = oracles(3)


@pytest.fixture(scope="module")
def sequences():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(30, 3, 6, generator=generator)
    y = torch.randint(3, (30, 12), generator=generator)
    x = centres.gather(1, y.unsqueeze(-1).expand(-1, -1, 6)) + 0.7 * torch.randn(30, 12, 6, generator=generator)
    return x, y


def expected(x, y, fit_predict):
    predicted = torch.zeros(len(y), len(POSITIONS), dtype=torch.int64)
    for b in range(len(y)):
        for column, t in enumerate(POSITIONS):
            if t:
                answer = fit_predict(x[b, :t].numpy(), y[b, :t].numpy(), x[b, t : t + 1].numpy())
                predicted[b, column] = int(answer)
    return predicted


def test_nearest_neighbour_matches_scikit_learn(sequences):
    def fit_predict(x, y, query):
        return KNeighborsClassifier(1).fit(x, y).predict(query)[0]

    assert torch.equal(nearest_neighbour(*sequences, POSITIONS), expected(*sequences, fit_predict))


def test_ridge_matches_scikit_learn(sequences):
    def fit_predict(x, y, query):
        return Ridge(alpha=1.0).fit(x, 2.0 * np.eye(3)[y] - 1).predict(query).argmax()

    assert torch.equal(ridge(*sequences, POSITIONS, 3), expected(*sequences, fit_predict))


def test_logistic_regression_matches_scikit_learn(sequences):
    def fit_predict(x, y, query):
        return LogisticRegression(max_iter=1000).fit(x, y).predict(query)[0] if len(set(y)) > 1 else y[0]

    assert torch.equal(logistic_regression(*sequences, POSITIONS), expected(*sequences, fit_predict))


@pytest.mark.parametrize("name", ORACLES)
def test_knows_nothing_of_the_label_asked_for_nor_of_the_future(name, sequences):
    x, y = sequences
    later_x, later_y = x.clone(), y.clone()
    later_x[:, 6:] += 10
    later_y[:, 6:] = (later_y[:, 6:] + 1) % 3
    assert torch.equal(ORACLES[name](later_x, later_y, (2, 5)), ORACLES[name](x, y, (2, 5)))
    flipped = y.clone()
    flipped[:, 5] = (flipped[:, 5] + 1) % 3
    assert torch.equal(ORACLES[name](x, y, (5,)), ORACLES[name](x, flipped, (5,)))
