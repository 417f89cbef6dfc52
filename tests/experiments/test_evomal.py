import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import ttest_ind

from experiments import evomal, evomal_ablation, evomal_table, evomal_transfer
from experiments.evomal import Generation
from metalearn.analysis.compare import holm
from metalearn.analysis.trials import keep_trial, read_trials
from metalearn.estimators.unrolled import Unrolled
from metalearn.losses.learned import LearnedLoss, load_loss
from metalearn.losses.network import NetworkLoss
from metalearn.models.vision import MLP
from metalearn.optim.first_order import SGD
from metalearn.problems.learned_loss import LossTask
from metalearn.random import key
from metalearn.search.local import Episode, one_step_gradients
from metalearn.tasks.sources import ImageSource
from metalearn.tasks.synthetic import HeavyTailedRegression

COMMAND = ["--smoke", "--data", "digits", "--models", "mlp", "--seeds", "2", "--out"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that the smoke run has filled."""
    out = tmp_path_factory.mktemp("evomal")
    evomal_table.main([*COMMAND, str(out)])
    return out


# -- searches --------------------------------------------------------------------------------------------------------


def generations(errors, seconds, monkeypatch):
    """A search of ten evaluations a generation that takes these seconds, by a clock of its own."""
    now = [100.0]
    monkeypatch.setattr(evomal, "clock", lambda device: now[0])

    def search():
        for error, spent in zip(errors, seconds, strict=True):
            now[0] += spent
            yield Generation(10, error, None if math.isinf(error) else load_loss("mse"))

    return search()


def test_cut_takes_the_best_at_each_point_and_no_later(monkeypatch):
    search = generations([math.inf, 0.5, 0.7, 0.2, 0.1], [1.0, 1.0, 4.0, 1.0, 1.0], monkeypatch)
    by_evaluations, by_seconds = evomal.cut(search, 25, seconds=6.5)
    assert (by_evaluations.error, by_evaluations.evaluations, by_evaluations.seconds) == (0.5, 30, 6.0)
    assert (by_seconds.error, by_seconds.evaluations, by_seconds.seconds) == (0.2, 40, 7.0)


def test_cut_by_seconds_can_come_first(monkeypatch):
    search = generations([0.5, 0.4, 0.3], [3.0, 3.0, 3.0], monkeypatch)
    by_evaluations, by_seconds = evomal.cut(search, 30, seconds=2.0)
    assert (by_evaluations.error, by_seconds.error, by_seconds.evaluations) == (0.3, 0.5, 10)


def test_cut_without_seconds_is_one_point(monkeypatch):
    search = generations([0.5, math.inf, 0.3], [3.0, 3.0, 3.0], monkeypatch)
    by_evaluations, by_seconds = evomal.cut(search, 15)
    assert by_evaluations == by_seconds
    assert by_evaluations.error == 0.5


@pytest.mark.parametrize("regression", [False, True])
def test_gradient_of_ml3_matches_unrolled_differentiation(regression):
    source = HeavyTailedRegression(num_train=50, num_validation=50) if regression else ImageSource("digits")
    task = LossTask(source, lambda d, k: MLP(d, k, (5,)).double(), SGD(0.1), batch_size=16, outer_batch_size=16)
    task.open(test=False)
    losses = [NetworkLoss(trainable=True, output=task.output, seed=seed).double() for seed in (0, 1)]
    weights = [loss.weights.detach() for loss in losses]
    slopes, step_key = [evomal.network_slope] * 2, key(0, "step")
    found = one_step_gradients(Episode(task, SGD(0.1), 1), slopes, weights, step_key)
    for loss, own, gradient in zip(losses, weights, found, strict=True):
        problem, estimator = Episode(task, SGD(0.1), 1, loss=loss), Unrolled("graph")
        batches, meta = problem.batches(step_key, 1), {"weights": own}
        state = estimator.init(problem, meta, step_key)
        exact = estimator.estimate(problem, meta, state, batches, step_key).grad["weights"]
        torch.testing.assert_close(gradient, exact, rtol=1e-8, atol=1e-12)


def test_networks_of_ml3_get_better_with_training():
    scale = evomal.SMOKE._replace(local_steps=20, train_steps=20)
    search = evomal.searching("ml3", evomal.open_task("digits", "mlp"), scale, key(0, "ml3"))
    errors = [generation.error for generation in itertools.islice(search, 4)]
    assert errors[-1] < errors[0]


def test_every_search_scores_a_loss_alike():
    """What a search says of its loss is what training under that loss from the shared start gives."""
    task, own = evomal.open_task("digits", "mlp"), key(3, "evomal")
    for method in ("evomal", "taylor", "ml3"):
        generation = next(evomal.searching(method, task, evomal.SMOKE, own))
        assert generation.loss is not None
        assert generation.evaluations == (evomal.SMOKE.restarts if method == "ml3" else evomal.SMOKE.population)
        again = evomal.score(task, [generation.loss], evomal.SMOKE, own)
        assert again == [pytest.approx(generation.error, abs=1e-3)]


def test_refuses_an_unknown_search():
    with pytest.raises(ValueError, match="method is 'annealing'; accepted: evomal"):
        evomal.searching("annealing", evomal.open_task("digits", "mlp"), evomal.SMOKE, key(0))


# -- the table -------------------------------------------------------------------------------------------------------


def test_smoke_tests_every_loss_of_every_seed_once(folder):
    trials = read_trials(folder / "trials_digits_mlp.jsonl")
    rivals = [f"{name}, equal {cut}" for name in evomal.SEARCHES[1:] for cut in evomal_table.CUTS]
    phases = ["evomal, weights 1", "evomal, long horizon", "gp_lfl, long horizon"]
    names = {"cross_entropy", "focal", "label_smoothing", "evomal", *rivals, *phases}
    expected = sorted((name, seed) for name in names for seed in (0, 1))
    assert sorted((trial["loss"], trial["seed"]) for trial in trials) == expected
    searches = read_trials(folder / "searches_digits_mlp.jsonl")
    for one in searches:
        own = next(s for s in searches if s["seed"] == one["seed"] and s["method"] == "evomal")
        assert one["evaluations"]["evaluations"] >= 16
        assert one["seconds"]["seconds"] >= own["evaluations"]["seconds"]
    assert (folder / "table.tex").exists()
    assert (folder / "phases.csv").exists()


def test_goes_on_where_it_stopped(folder, tmp_path, capsys):
    for name in ("searches_digits_mlp.jsonl", "trials_digits_mlp.jsonl"):
        (tmp_path / name).write_text((folder / name).read_text())
    searches, trials = tmp_path / "searches_digits_mlp.jsonl", tmp_path / "trials_digits_mlp.jsonl"
    lines = trials.read_text().splitlines()
    trials.write_text("".join(line + "\n" for line in lines[:-4]))
    before = searches.read_text()
    capsys.readouterr()
    evomal_table.main([*COMMAND, str(tmp_path)])
    assert searches.read_text() == before
    assert capsys.readouterr().out.startswith("seed 1, digits, mlp, ")
    again, first = read_trials(trials), [json.loads(line) for line in lines]
    assert [(one["loss"], one["error"]) for one in again if "long" not in one["loss"]] == [
        (one["loss"], one["error"]) for one in first if "long" not in one["loss"]
    ]
    with pytest.raises(ValueError, match="trials of other population"):
        evomal_table.main([*COMMAND, str(tmp_path), "--population", "17"])


def test_budget_ends_between_trials(tmp_path, capsys):
    with pytest.raises(ValueError, match="has no two seeds of anything"):
        evomal_table.main([*COMMAND, str(tmp_path), "--budget_minutes", "1e-6"])
    assert "stopped by --budget_minutes before seed 0, digits, mlp, evomal" in capsys.readouterr().out


def test_refuses_a_comparison_without_its_clock():
    with pytest.raises(ValueError, match="accepted: with evomal"):
        evomal_table.main(["--methods", "random"])


def test_tuning_at_a_long_horizon_lowers_what_it_descends():
    task, scale = evomal.open_task("digits", "mlp"), evomal.SMOKE._replace(tune_steps=12, tune_horizon=8)
    loss = LearnedLoss("mul(-1,mul(y,log(p)))", [0.3] * 5)
    tuned = evomal_table.tune(task, loss, scale, key(0, "tune"))

    def objective(own):
        problem = task.with_loss(own)
        runs = [problem.trained({}, one, problem.batches(one, 8)).end for one in (key(5), key(6))]
        return sum(problem.score(end, "validation")["loss"] for end in runs)

    assert objective(tuned) < objective(loss) - 0.02


def trial(data, loss, seed, error, **more):
    cell = {"data": data, "model": "mlp", "baseline": "cross_entropy"}
    return cell | {"loss": loss, "seed": seed, "error": error, "rate": 0.1} | more


def test_table_matches_differences_and_tests_by_hand():
    errors = {
        ("a", "cross_entropy"): [0.30, 0.32, 0.31],
        ("a", "evomal"): [0.20, 0.24, 0.19],
        ("a", "random, equal seconds"): [0.29, 0.35, 0.30],
        ("b", "cross_entropy"): [0.50, 0.51, 0.55],
        ("b", "evomal"): [0.52, 0.50, 0.53],
    }
    trials = [
        trial(data, loss, seed, error) | ({} if "cross" in loss else {"evaluations": 10 * (seed + 1), "seconds": 2.0})
        for (data, loss), own in errors.items()
        for seed, error in enumerate(own)
    ]
    ignored = [trial("a", "evomal, weights 1", 0, 0.9), trial("a", "gp_lfl, long horizon", 0, 0.9)]
    table = evomal_table.result_table(trials + ignored).set_index(["data", "loss"])
    assert list(table.index) == list(errors)
    p = []
    for place, own in errors.items():
        row, base = table.loc[place], np.array(errors[place[0], "cross_entropy"])
        assert row["n"] == 3
        assert row["error"] == pytest.approx(np.mean(own))
        assert row["sd"] == pytest.approx(np.std(own, ddof=1))
        if place[1] != "cross_entropy":
            assert row["difference"] == pytest.approx(np.mean(own - base))
            assert row["low"] <= row["difference"] <= row["high"]
            assert (row["evaluations"], row["seconds"]) == (20, 2.0)
            p.append(ttest_ind(own, base, equal_var=False)[1])
            assert row["p_welch"] == pytest.approx(p[-1])
    found = table["p_holm"].dropna().to_numpy(float)
    np.testing.assert_allclose(found, holm(p))


def test_phases_match_paired_differences_by_hand():
    values = {
        "evomal, weights 1": [0.5, 0.6, 0.4],
        "evomal": [0.4, 0.5, 0.5],
        "evomal, long horizon": [0.1, 0.2, 0.3],
        "gp_lfl, equal evaluations": [0.3, 0.3, 0.2],
        "gp_lfl, long horizon": [0.2, 0.3, 0.2],
        "gp_lfl, equal seconds": [9.0, 9.0, 9.0],
        "cross_entropy": [9.0, 9.0, 9.0],
    }
    trials = [trial("a", loss, seed, error) for loss, own in values.items() for seed, error in enumerate(own)]
    trials += [trial("b", loss, 0, error) for loss, error in (("evomal, weights 1", 0.2), ("evomal", 0.5))]
    table = evomal_table.phase_table(trials).set_index(["data", "group"])
    assert table.loc[("a", "evomal"), "difference"] == pytest.approx(-0.1 / 3)
    assert table.loc[("a", "evomal, long horizon"), "difference"] == pytest.approx(-0.3)
    assert table.loc[("a", "gp_lfl, long horizon"), "difference"] == pytest.approx(-0.1 / 3)
    assert table.loc[("all with cross_entropy", "evomal"), "difference"] == pytest.approx(0.2 / 4)
    assert set(table["mean"]) & {9.0} == set()


# -- transfer and ablation ---------------------------------------------------------------------------------------------


def test_transfer_tests_each_found_loss_beside_the_standard_ones(folder, tmp_path, capsys):
    (tmp_path / "searches_digits_mlp.jsonl").write_text((folder / "searches_digits_mlp.jsonl").read_text())
    elsewhere = read_trials(folder / "searches_digits_mlp.jsonl")
    for one in elsewhere:  # as if the same had been found with another model
        keep_trial(tmp_path / "searches_digits_linear.jsonl", one | {"settings": one["settings"] | {"model": "linear"}})
    evomal_transfer.main(["--smoke", "--out", str(tmp_path)])
    for model in ("mlp", "linear"):
        trials = read_trials(tmp_path / f"transfer_digits_{model}.jsonl")
        by_loss = {(one["loss"], one["seed"]): one["error"] for one in trials}
        assert len(by_loss) == len(trials) == 2 * 5
        for seed in (0, 1):
            assert by_loss["digits, mlp", seed] == by_loss["digits, linear", seed]
    assert "digits, linear" in capsys.readouterr().out
    before = {file: file.read_text() for file in tmp_path.glob("transfer_digits_*")}
    evomal_transfer.main(["--smoke", "--out", str(tmp_path)])
    assert {file: file.read_text() for file in tmp_path.glob("transfer_digits_*")} == before


def test_matrix_has_means_by_loss_and_target():
    trials = [
        trial("a", "cross_entropy", 0, 0.1),
        trial("a", "cross_entropy", 1, 0.3),
        trial("b", "b, mlp", 0, 0.5),
    ]
    table = evomal_transfer.matrix(trials).set_index("loss")
    assert table.loc["cross_entropy", "a, mlp"] == pytest.approx(0.2)
    assert table.loc["b, mlp", "b, mlp"] == 0.5
    assert math.isnan(table.loc["b, mlp", "a, mlp"])


def test_transfer_refuses_a_folder_without_searches(tmp_path):
    with pytest.raises(ValueError, match="has no searches by evomal"):
        evomal_transfer.main(["--out", str(tmp_path)])


def test_ablation_smoke_compares_every_variant(tmp_path, capsys):
    evomal_ablation.main(["--smoke", "--seeds", "2", "--out", str(tmp_path)])
    trials = read_trials(tmp_path / "trials.jsonl")
    assert {(one["method"], one["seed"]) for one in trials} == {
        (n, s) for n in evomal_ablation.VARIANTS for s in (0, 1)
    }
    trained = {(one["method"], one["seed"]): one["trained"] for one in trials}
    for seed in (0, 1):
        assert trained["no screening", seed] > trained["full", seed]
        assert trained["halving", seed] == trained["full", seed]
    assert "seconds, paired by seed" in capsys.readouterr().out
    assert (tmp_path / "ablation_seconds.csv").exists()
