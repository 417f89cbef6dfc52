"""Errors of losses, each at the learning rate that suits it best, all losses and rates trained as one population.

Shape letters: P rows of a population, L losses, R learning rates.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metalearn import tree
from metalearn.base import Rule
from metalearn.losses.elementwise import ElementwiseLoss
from metalearn.optim.first_order import Tunable
from metalearn.problems.learned_loss import LossTask
from metalearn.search.candidates import gradients_of
from metalearn.search.population import PopulationTraining, Trained, rows

_ADDED = 3  # rates that a grid grows by
_CHUNK = 2**10  # predictions at a time: more, of convolutions, fall out of the cache and take twice as long


def learning_rates(rule: Rule, rates: Sequence[float] | None = None) -> list[float]:
    """The grid in increasing order: as given, or nine rates around the rule's own, four a decade.

    So close, because the losses that a search finds suit its rate, and between two rates a standard loss would lose.

    Raises:
        ValueError: for fewer than three different rates, rates that are not positive, or a rule whose rate is unknown.
    """
    if rates is None:
        own = rule.settings.get("lr", 0.0) if isinstance(rule, Tunable) else 0.0
        if own <= 0:
            raise ValueError(f"rates is None with {type(rule).__name__} of no learning rate; accepted: a list of rates")
        return [own * 10 ** (k / 4) for k in range(-4, 5)]
    grid = sorted({float(rate) for rate in rates})
    if len(grid) < 3 or not all(0 < rate < float("inf") for rate in grid):
        raise ValueError(f"rates is {list(rates)}; accepted: at least 3 different positive numbers")
    return grid


def tuned_errors(
    task: LossTask,
    losses: Mapping[str, ElementwiseLoss],
    rates: Sequence[float],
    steps: int,
    key: torch.Tensor,
    part: str = "test",
) -> list[dict[str, Any]]:
    """Errors of models trained under each loss, at the rate with the least validation error; see ``tuned_models``.

    Args:
        task: opened, with the part that counts.
        losses: by name, on any device.
        rates: learning rates, in increasing order.
        steps: of every run.
        key: of the initial model and the minibatches, on the device to compute on.
        part: whose error counts.

    Returns:
        The rows of ``tuned_models``, each with error (on ``part``), which is infinite where no run stayed finite.
    """
    found, models = tuned_models(task, losses, rates, steps, key)
    errors_L = PopulationTraining(steps=steps).errors(task, models, part, _CHUNK)
    return [row | {"error": error} for row, error in zip(found, errors_L.tolist(), strict=True)]


def tuned_models(
    task: LossTask, losses: Mapping[str, ElementwiseLoss], rates: Sequence[float], steps: int, key: torch.Tensor
) -> tuple[list[dict[str, Any]], Trained]:
    """A model trained under each loss, at the rate with the least validation error.

    All losses and rates are one population: the same initial model, the same minibatches. Among rates with equal
    validation errors the middle one is chosen.

    Args:
        task: opened.
        losses: by name, on any device.
        rates: learning rates, in increasing order.
        steps: of every run.
        key: of the initial model and the minibatches, on the device to compute on.

    Returns:
        For each loss: loss, rate, validation (error, infinite where no run stayed finite), edge ("low", "high" or "both": the
        ends of the grid, after it has grown, that no rate is better than; else ""), lowest and highest (rate tried). And
        the models, in the order of the losses.
    """
    training = PopulationTraining(steps=steps)
    losses = {name: copy.deepcopy(loss).to(key.device) for name, loss in losses.items()}
    runs = [_train(training, task, losses, rates, key)]
    if grown := _more_rates(rates, runs[0][1]):
        runs.append(_train(training, task, losses, grown, key))
    every = np.array([*rates, *grown])
    order = np.argsort(every)
    validation_LR = np.concatenate([validation for _, validation in runs], axis=1)[:, order]
    chosen_L = [_middle_best(validation_R) for validation_R in validation_LR]
    places_L = [int(order[chosen]) for chosen in chosen_L]
    found = [
        {
            "loss": name,
            "rate": float(every[place]),
            "validation": float(validation_LR[row, chosen]),
            "edge": _edge(validation_LR[row]),
            "lowest": float(every.min()),
            "highest": float(every.max()),
        }
        for row, (name, chosen, place) in enumerate(zip(losses, chosen_L, places_L, strict=True))
    ]
    return found, _chosen(runs, places_L)


def _train(
    training: PopulationTraining,
    task: LossTask,
    losses: Mapping[str, ElementwiseLoss],
    rates: Sequence[float],
    key: torch.Tensor,
) -> tuple[Trained, NDArray[np.float64]]:
    """The trained population, loss by loss and rate by rate, and its validation errors (L, R)."""
    gradients = gradients_of([loss for loss in losses.values() for _ in rates], task.output)
    rates_P = torch.tensor([*rates] * len(losses), dtype=next(task.module.parameters()).dtype, device=key.device)
    trained = training.train(task, gradients, key, rates_P)
    errors_P = training.errors(task, trained, "validation", _CHUNK)
    return trained, errors_P.double().cpu().numpy().reshape(len(losses), len(rates))


def _chosen(runs: Sequence[tuple[Trained, NDArray[np.float64]]], places_L: Sequence[int]) -> Trained:
    """One model of each loss; ``places`` count through the rates of all runs."""
    parts, order, first = [], [], 0
    for trained, validation_LR in runs:
        count = validation_LR.shape[1]
        own = [row for row, place in enumerate(places_L) if first <= place < first + count]
        parts.append(rows(trained, [row * count + places_L[row] - first for row in own]))
        order += own
        first += count
    return rows(tree.map(lambda *same: torch.cat(same), *parts), np.argsort(order).tolist())


def _middle_best(validation_R: NDArray[np.float64]) -> int:
    best = np.flatnonzero(validation_R == validation_R.min())
    return int(best[len(best) // 2])


def _edge(validation_R: NDArray[np.float64]) -> str:
    """The ends of the grid that no other rate is better than; none where nothing was finite."""
    low, high = (np.isfinite(end) and end == validation_R.min() for end in (validation_R[0], validation_R[-1]))
    return "both" if low and high else "low" if low else "high" if high else ""


def _more_rates(rates: Sequence[float], validation_LR: NDArray[np.float64]) -> list[float]:
    """Three rates beyond each end of the grid at which some loss is best."""
    edges = {_edge(validation_R) for validation_R in validation_LR}
    ratio = (rates[-1] / rates[0]) ** (1 / (len(rates) - 1))
    low = [rates[0] / ratio**k for k in range(1, _ADDED + 1)] if edges & {"low", "both"} else []
    high = [rates[-1] * ratio**k for k in range(1, _ADDED + 1)] if edges & {"high", "both"} else []
    return low + high
