"""Transfer: the tuned errors against plain loops, the statistics against scipy, the table as a user gets it."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from problems.conftest import Clusters, double, opened
from scipy.stats import ttest_ind
from torch.func import functional_call

from metalearn import random
from metalearn.analysis.compare import holm
from metalearn.analysis.rates import learning_rates, tuned_errors
from metalearn.analysis.transfer import (
    build_model,
    compared_losses,
    open_source,
    transfer,
    transfer_table,
    welch,
)
from metalearn.base import Examples
from metalearn.losses.learned import load_loss
from metalearn.models.vision import MLP
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


# -- statistics --------------------------------------------------------------------------------------------------------


def test_matches_scipys_welch_test() -> None:
    stream = np.random.default_rng(0)
    left, right = stream.normal(0, 1, 5), stream.normal(1, 3, 7)
    assert welch(left, right) == pytest.approx(ttest_ind(left, right, equal_var=False).pvalue)
    assert np.isnan([welch(left, [np.inf, 1.0]), welch([1.0, 1.0], [2.0, 2.0]), welch([1.0], right)]).all()


def test_the_table_pairs_seeds_and_corrects_for_all_tests_of_the_command() -> None:
    stream = np.random.default_rng(1)
    rows = [
        {"data": data, "model": "mlp", "baseline": "mse", "loss": loss, "seed": seed, "rate": 0.1 * (1 + seed)}
        for data in ("a", "b")
        for loss in ("mse", "mae", "mine")
        for seed in range(5)
    ]
    trials = pd.DataFrame(rows).assign(error=stream.normal(1, 0.1, len(rows)))
    table = transfer_table(trials)
    assert list(table["loss"]) == ["mse", "mae", "mine"] * 2
    wide = {key: part["error"].to_numpy() for key, part in trials.groupby(["data", "loss"])}
    for row in table.to_dict("records"):
        own, mse = wide[row["data"], row["loss"]], wide[row["data"], "mse"]
        assert (row["error"], row["sd"]) == pytest.approx((own.mean(), own.std(ddof=1)))
        assert row["rates"] == "0.1 0.2 0.3 0.4 0.5"
        if row["loss"] == "mse":
            assert np.isnan([row["difference"], row["p_welch"], row["p_holm"]]).all()
            continue
        assert row["difference"] == pytest.approx((own - mse).mean()) and row["low"] < row["difference"] < row["high"]
        assert row["p_welch"] == pytest.approx(ttest_ind(own, mse, equal_var=False).pvalue)
    np.testing.assert_allclose(table["p_holm"], holm(table["p_welch"]))


# -- what is compared on what ------------------------------------------------------------------------------------------


def test_the_default_grid_is_seven_rates_around_the_rules_own() -> None:
    np.testing.assert_allclose(learning_rates(Adam(1e-2)), np.geomspace(10**-3.5, 10**-0.5, 7))
    assert learning_rates(SGD(), [1, 0.1, 0.1, 0.01]) == [0.01, 0.1, 1.0]
    for rates in ([0.1, 0.2], [0.0, 0.1, 0.2], [-1, 1, 2]):
        with pytest.raises(ValueError, match="accepted: at least 3 different positive numbers"):
            learning_rates(SGD(), rates)
    with pytest.raises(ValueError, match="rates is None with SGD of no learning rate"):
        learning_rates(SGD(lr=0.0))


def test_runs_files_and_texts_stand_beside_the_standard_losses(task: LossTask, tmp_path: Path) -> None:
    run = tmp_path / "found"
    run.mkdir()
    load_loss("square(sub(y,p))").save(run / "best.json")
    load_loss("abs(sub(y,p))").save(tmp_path / "found.json")
    losses = compared_losses([str(run), str(tmp_path / "found.json"), "log(sub(y,p))", "focal"], task)
    standard = ["cross_entropy", "focal", "label_smoothing"]
    assert list(losses) == [*standard, "found", "found (2)", "log(sub(y,p))"]
    assert str(losses["found"].program) == "square(sub(y,p))" and losses["found (2)"].output == "softmax"
    with pytest.raises(ValueError, match=r"has no best\.json; accepted: the folder of a run"):
        compared_losses([str(tmp_path)], task)


def test_a_test_split_of_the_datas_own_is_used(tmp_path: Path) -> None:
    for part, count in (("train", 20), ("test", 7)):
        pd.DataFrame({"a": np.arange(count), "label": np.arange(count) % 2}).to_csv(
            tmp_path / f"{part}.csv", index=False
        )
    source = open_source(str(tmp_path), "table", "train", None, 0.25)
    assert [len(source.read(part).targets) for part in ("train", "validation", "test")] == [15, 5, 7]
    assert len(open_source(str(tmp_path), "table", "train", 0.5, 0.2).read("test").targets) == 10
    with pytest.raises(ValueError, match="validation is 0; accepted: 0 < validation < 1"):
        open_source(str(tmp_path), "table", "train", None, 0)


def test_models_by_name_and_class_path() -> None:
    digits = open_source("digits", "images", "train", None, 0.2)
    assert digits.test == 0.2  # it has no test split of its own
    for name in ("linear", "mlp", "lenet", "resnet", "metalearn.models.vision.MLP"):
        assert build_model(name, digits)(64, 10)(torch.zeros(2, 64)).shape == (2, 10)
    assert len(build_model("linear", digits)(64, 10)) == 1 and build_model("mlp", digits) is MLP
    with pytest.raises(ValueError, match="model is 'perceptron'; accepted: 'linear', 'mlp'"):
        build_model("perceptron", digits)


def test_regression_is_compared_with_squared_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = transfer(
        ["abs(sub(y,p))"],
        data="diabetes",
        model="linear,mlp",
        task="regression",
        seeds=2,
        steps=20,
        rates=[0.003, 0.01, 0.03],
        batch_size=32,
        out=str(tmp_path),
    )
    assert list(table["loss"]) == ["mse", "mae", "huber", "abs(sub(y,p))"] * 2 and table["error"].between(0, 2).all()
    for model in ("linear", "mlp"):
        kept = pd.read_csv(tmp_path / f"transfer_diabetes_{model}.csv")
        pd.testing.assert_frame_equal(kept, table[table["model"] == model].reset_index(drop=True))
        assert len(pd.read_csv(tmp_path / f"transfer_diabetes_{model}_seeds.csv")) == 8
    # mae and the learned text are one function: trained alike, to the last digit that is shown
    by_name = table[table["model"] == "mlp"].set_index("loss")
    assert by_name.loc["mae", "error"] == pytest.approx(by_name.loc["abs(sub(y,p))", "error"], rel=1e-4)
    printed = capsys.readouterr().out
    assert "diabetes, mlp: test error (20 steps, 2 seeds); difference from mse with 95% interval" in printed
