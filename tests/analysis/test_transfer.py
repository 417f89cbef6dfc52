"""Transfer: the statistics against scipy, the table as a user gets it."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from problems.conftest import Clusters, double, opened
from scipy.stats import ttest_ind, ttest_rel

from metalearn.analysis.compare import holm
from metalearn.analysis.rates import tuned_errors
from metalearn.analysis.transfer import (
    build_model,
    compared_losses,
    open_source,
    open_task,
    transfer,
    transfer_table,
    welch,
)
from metalearn.losses.learned import load_loss
from metalearn.models.vision import MLP
from metalearn.optim.first_order import SGD
from metalearn.problems.learned_loss import LossTask
from metalearn.tasks.synthetic import HeavyTailedRegression


@pytest.fixture
def task() -> LossTask:
    settings = {"batch_size": 8, "outer_batch_size": None, "untouched": 0.0}
    return opened(LossTask(Clusters(), double, SGD(0.1), **settings))


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
    table = transfer_table(trials, confidence=0.9)
    assert list(table["loss"]) == ["mse", "mae", "mine"] * 2
    wide = {key: part["error"].to_numpy() for key, part in trials.groupby(["data", "loss"])}
    for row in table.to_dict("records"):
        own, mse = wide[row["data"], row["loss"]], wide[row["data"], "mse"]
        assert (row["error"], row["sd"]) == pytest.approx((own.mean(), own.std(ddof=1)))
        assert row["rates"] == "0.1 0.2 0.3 0.4 0.5"
        if row["loss"] == "mse":
            assert np.isnan([row["difference"], row["p_welch"], row["p_holm"]]).all()
            continue
        interval = ttest_rel(own, mse).confidence_interval(0.9)
        assert row["difference"] == pytest.approx((own - mse).mean())
        assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
        assert row["p_welch"] == pytest.approx(ttest_ind(own, mse, equal_var=False).pvalue)
    np.testing.assert_allclose(table["p_holm"], holm(table["p_welch"]))


def test_one_seed_has_no_interval_and_no_deviation() -> None:
    trials = pd.DataFrame({"loss": ["mse", "mine"], "error": [1.0, 0.9], "rate": 0.1, "seed": 0})
    row = transfer_table(trials.assign(data="a", model="mlp", baseline="mse")).iloc[1]
    assert row["difference"] == pytest.approx(-0.1)
    assert np.isnan(row[["sd", "low", "high", "p_welch", "p_holm"]].to_numpy(float)).all()


# -- what is compared on what ------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("path", ["os.path.join", "math.pi", "torch.nn.Identity", "torch.nn.ReLU", "builtins.print"])
def test_what_makes_no_module_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=rf"model is '{path}'.*accepted: what makes a module of 4 features") as found:
        build_model(path, Clusters())(4, 3)
    assert "\n" not in str(found.value)


def test_everything_is_checked_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metalearn.analysis.transfer.tuned_errors", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").touch()
    for options, message in (
        ({"confidence": 1}, "confidence is 1; accepted: 0 < confidence < 1"),
        ({"seeds": 1}, "seeds is 1; accepted: 2 <= seeds"),
        ({"steps": 0}, "steps is 0; accepted: 1 <= steps"),
        ({"out": str(tmp_path / "file" / "below")}, "out is .*accepted: a folder"),
        ({"device": "cuda:99"}, "device is 'cuda:99'; accepted: one that torch finds here"),
        ({"data": "digits,nothing.csv"}, "path is 'nothing.csv'"),
        ({"data": "digits,digits"}, "data is 'digits,digits'; accepted: names that differ"),
        ({"model": "linear,math.pi"}, "model is 'math.pi'"),
    ):
        with pytest.raises(ValueError, match=message):
            transfer(["abs(sub(y,p))"], **{"model": "linear"} | options)


def test_pairs_that_are_done_are_kept_when_a_later_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def train(*arguments):
        calls.append(arguments)
        if len(calls) > 2:
            raise InterruptedError
        return tuned_errors(*arguments)

    monkeypatch.setattr("metalearn.analysis.transfer.tuned_errors", train)
    with pytest.raises(InterruptedError):
        settings = {"seeds": 2, "steps": 3, "rates": [0.01, 0.03, 0.1], "out": str(tmp_path)}
        transfer(["abs(sub(y,p))"], model="linear,mlp", **settings)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "transfer_digits_linear.csv",
        "transfer_digits_linear_seeds.csv",
    ]


def test_heavy_tailed_targets_are_compared_unscaled(tmp_path: Path) -> None:
    source = open_source("heavy_tailed", "images", "train", None, 0.2)
    task = open_task(source, "linear", SGD(0.01), 64, test=True)
    assert source.fingerprint() == HeavyTailedRegression().fingerprint()
    torch.testing.assert_close(task.parts["train"].targets, source.read("train").targets)
    settings = {"seeds": 2, "steps": 100, "rates": [1e-3, 3e-3, 1e-2], "batch_size": 64, "out": str(tmp_path)}
    table = transfer(["abs(sub(y,p))"], data="heavy_tailed", **settings)
    errors = table.set_index("loss")["error"]
    assert errors["abs(sub(y,p))"] < errors["mse"]  # outliers pull squared error away


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
    assert "diabetes, mlp: test error (20 steps, 2 seeds); difference from mse with 95% paired t interval" in printed
