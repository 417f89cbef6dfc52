"""Errors at tuned learning rates: a loop of torch's own, and the ends of grids."""

import numpy as np
import pytest
import torch
from problems.conftest import Clusters, double, opened
from torch.func import functional_call

from metalearn import random
from metalearn.analysis.rates import learning_rates, tuned_errors
from metalearn.base import Examples
from metalearn.losses.learned import load_loss
from metalearn.optim.first_order import SGD, Adam
from metalearn.problems.learned_loss import LossTask

LOSSES = {"cross_entropy": "cross_entropy", "square": "square(sub(y,p))", "against": "log(sub(y,p))"}
KEY = random.key(5, "transfer")


@pytest.fixture
def task() -> LossTask:
    source = Clusters(num_examples=60, spread=2.5)
    settings = {"batch_size": 8, "outer_batch_size": None, "untouched": 0.0}
    return opened(LossTask(source, double, SGD(0.1, momentum=0.9), **settings), test=True)


def trained_alone(task: LossTask, loss: str, rate: float, steps: int) -> tuple[float, float]:
    """Validation and test error of a module that torch trains."""
    criterion = load_loss(loss).double()
    params, _ = task.initial(random.fold(KEY, "init"))
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    optimizer = torch.optim.SGD(list(leaves.values()), lr=rate, momentum=0.9)
    for step in range(steps):
        batch = task.inner_batch(random.fold(KEY, "batch", step))
        optimizer.zero_grad()
        criterion(functional_call(task.module, leaves, (batch.inputs,)), batch.targets).backward()
        optimizer.step()
    errors = []
    for part in ("validation", "test"):
        inputs, targets = task.examples(part, "cpu")
        wrong = functional_call(task.module, leaves, (inputs,)).argmax(-1) != targets
        errors.append(float(wrong.double().mean()))
    return errors[0], errors[1]


def test_matches_one_loss_and_rate_at_a_time(task: LossTask) -> None:
    rates = [0.003, 0.03, 0.1, 0.3, 3.0]
    found = tuned_errors(task, {name: load_loss(text) for name, text in LOSSES.items()}, rates, 40, KEY)
    tried = sorted({row["lowest"] for row in found} | {row["highest"] for row in found})
    for row in found:
        every = [*rates]
        ratio = (rates[-1] / rates[0]) ** 0.25
        every += [rates[0] / ratio**k for k in (1, 2, 3)] if tried[0] < rates[0] else []
        every += [rates[-1] * ratio**k for k in (1, 2, 3)] if tried[-1] > rates[-1] else []
        alone = {rate: trained_alone(task, LOSSES[row["loss"]], rate, 40) for rate in every}
        assert row["validation"] == pytest.approx(min(validation for validation, _ in alone.values()))
        nearest = min(alone, key=lambda rate: abs(rate - row["rate"]))
        assert nearest == pytest.approx(row["rate"])
        assert (row["validation"], row["error"]) == pytest.approx(alone[nearest])


def test_a_grid_grows_once_towards_the_rate_that_wins_at_its_edge(task: LossTask) -> None:
    losses = {"cross_entropy": load_loss("cross_entropy")}
    (row,) = tuned_errors(task, losses, [1e-7, 1e-6, 1e-5, 1e-4], 20, KEY)
    assert row["highest"] == pytest.approx(1e-1) and row["rate"] > 2e-4
    (still,) = tuned_errors(task, losses, [1e-9, 1e-8, 1e-7, 1e-6], 20, KEY)
    assert still["highest"] == pytest.approx(1e-3) and still["edge"] in ("high", "both")


class Numbers(Clusters):
    """Regression of two features' difference."""

    def __init__(self):
        super().__init__()
        self.num_classes = 1

    def read(self, part):
        inputs, _ = super().read(part)
        return Examples(inputs, inputs[:, 0] - inputs[:, 1])


def test_a_loss_that_diverges_at_every_rate_has_an_infinite_error() -> None:
    settings = {"batch_size": 8, "outer_batch_size": None, "untouched": 0.0}
    task = opened(LossTask(Numbers(), double, SGD(0.1), **settings), test=True)
    (row,) = tuned_errors(task, {"mse": load_loss("mse", output="identity")}, [1e6, 1e7, 1e8], 300, KEY)
    assert row["error"] == row["validation"] == float("inf") and row["edge"] == "" and row["highest"] == 1e8


def test_losses_go_where_the_key_is_and_stay_what_they_were(task: LossTask, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def stop(losses, output):
        seen.extend(loss.weights.device.type for loss in losses)
        raise InterruptedError

    monkeypatch.setattr("metalearn.analysis.rates.gradients_of", stop)
    loss = load_loss(LOSSES["square"])
    with pytest.raises(InterruptedError):  # before anything is computed, which "meta" would not do
        tuned_errors(task, {"square": loss}, [0.1, 0.2, 0.3], 5, KEY.to("meta"))
    assert seen == ["meta"] * 3 and loss.weights.device.type == "cpu"


def test_the_default_grid_is_nine_rates_around_the_rules_own() -> None:
    np.testing.assert_allclose(learning_rates(Adam(1e-2)), np.geomspace(1e-3, 1e-1, 9))
    assert learning_rates(SGD(), [1, 0.1, 0.1, 0.01]) == [0.01, 0.1, 1.0]
    for rates in ([0.1, 0.2], [0.0, 0.1, 0.2], [-1, 1, 2]):
        with pytest.raises(ValueError, match="accepted: at least 3 different positive numbers"):
            learning_rates(SGD(), rates)
    with pytest.raises(ValueError, match="rates is None with SGD of no learning rate"):
        learning_rates(SGD(lr=0.0))
