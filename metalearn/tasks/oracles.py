"""What classical learners achieve on the very sequences a meta-trained learner sees: reference curves for every table.

B sequences, T examples, D features, K classes. Every function answers: had it been fitted on the examples before
position t alone, what would it have said of example t? With no example before it, an oracle says class 0.
"""

import functools
from collections.abc import Sequence

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional

from metalearn.base import Oracle


def oracles(num_classes: int) -> dict[str, Oracle]:
    """Reference classifiers for tasks of K classes, by name."""
    return {
        "1-nearest-neighbour": nearest_neighbour,
        "ridge": functools.partial(ridge, num_classes=num_classes),
        "logistic regression": logistic_regression,
    }


def nearest_neighbour(x_BTD: Tensor, y_BT: Tensor, positions: Sequence[int]) -> Tensor:
    """1-nearest-neighbour in Euclidean distance; the earliest of equals wins. Returns: labels (B, len(positions)).

    In regression, too: the target of the nearest example, and 0 before the first.
    """
    squared_BT = x_BTD.square().sum(-1)
    distance_BTT = (
        squared_BT.unsqueeze(1) - 2 * x_BTD @ x_BTD.mT
    )  # up to a constant per row; row t asks, column s answers
    future = torch.ones(x_BTD.shape[1], x_BTD.shape[1], dtype=torch.bool, device=x_BTD.device).triu()
    nearest_BT = distance_BTT.masked_fill(future, float("inf")).argmin(-1)
    predicted_BT = y_BT.gather(1, nearest_BT)
    predicted_BT[:, 0] = 0
    return predicted_BT[:, list(positions)]


def ridge(x_BTD: Tensor, y_BT: Tensor, positions: Sequence[int], num_classes: int, penalty: float = 1.0) -> Tensor:
    """Ridge regression on targets ±1 with a free intercept, in its dual form. Returns: classes (B, len(positions)).

    With X, Y centred over the n examples seen: f(x) = mean(Y) + (x - mean(X)) Xᵀ (X Xᵀ + penalty · I)⁻¹ Y.
    """
    signs_BTK = 2.0 * functional.one_hot(y_BT, num_classes).to(x_BTD.dtype) - 1
    predicted = []
    for t in positions:
        if t == 0:
            predicted.append(torch.zeros_like(y_BT[:, 0]))
            continue
        mean_x, mean_y = x_BTD[:, :t].mean(1, keepdim=True), signs_BTK[:, :t].mean(1, keepdim=True)
        seen, target = x_BTD[:, :t] - mean_x, signs_BTK[:, :t] - mean_y
        gram = seen @ seen.mT + penalty * torch.eye(t, dtype=x_BTD.dtype, device=x_BTD.device)
        score_B1K = mean_y + (x_BTD[:, t : t + 1] - mean_x) @ seen.mT @ torch.linalg.solve(gram, target)
        predicted.append(score_B1K.squeeze(1).argmax(-1))
    return torch.stack(predicted, dim=1)


def logistic_regression(x_BTD: Tensor, y_BT: Tensor, positions: Sequence[int]) -> Tensor:
    """scikit-learn's LogisticRegression as it comes (multinomial, L2, C = 1). Returns: classes (B, len(positions))."""
    x, y = x_BTD.double().cpu().numpy(), y_BT.cpu().numpy()
    predicted = torch.zeros(len(y), len(positions), dtype=torch.int64)
    for b in range(len(y)):
        for column, t in enumerate(positions):
            classes = set(y[b, :t])
            if len(classes) > 1:
                fitted = LogisticRegression(max_iter=1000).fit(x[b, :t], y[b, :t])
                predicted[b, column] = int(fitted.predict(x[b, t : t + 1])[0])
            elif classes:
                predicted[b, column] = int(classes.pop())
    return predicted.to(y_BT.device)
