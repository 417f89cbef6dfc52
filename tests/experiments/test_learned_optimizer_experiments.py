"""Experiments on learned rules in small, and what their tables say of trials that are made up."""

import math

import pytest
import torch

from experiments import lopt_tradeoffs, meta_trained, pes_vs_truncated, star_stability
from metalearn.analysis.trials import read_trials
from metalearn.base import Estimator, MetaGradient
from metalearn.optim.learnable import LearnableSGD
from metalearn.optim.saving import load_rule
from metalearn.optim.small_mlp import SmallMLP
from metalearn.problems.baselines import HAND_MADE, curves, tuned
from metalearn.problems.toys import InfluenceBalancing
from metalearn.random import key


def refuse(*args, **kwargs):
    raise AssertionError("a trial that was kept is made again")


# -- what they share ---------------------------------------------------------------------------------------------------


class Scripted(Estimator):
    """An estimator whose gradient of everything is a number."""

    def __init__(self, gradient: float):
        self.gradient = gradient

    def refusal(self, problem):
        return None

    def init(self, problem, meta, key):
        return {}

    def estimate(self, problem, meta, state, batches, key):
        grads = {name: torch.full_like(value, self.gradient) for name, value in meta.items()}
        return MetaGradient(grads, torch.zeros(()), state, {})


def test_matches_the_closed_form_of_decay_and_of_adam() -> None:
    problem, seen = InfluenceBalancing(), []
    start = problem.init_meta(meta_trained.fold(key(0, "meta-training"), "meta"))["theta"]
    budget = meta_trained.Budget(3)
    still = meta_trained.meta_train(problem, Scripted(0.0), 0, budget, lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(still["theta"], start * 0.95**3)

    def watch(steps, seconds, meta):
        seen.append((steps, seconds, meta["theta"]))

    meta_trained.meta_train(problem, Scripted(100.0), 0, budget, lr=0.1, watch=watch)
    torch.testing.assert_close(torch.stack([theta for *_, theta in seen]), start - 0.1 * torch.arange(1, 4))
    assert [steps for steps, *_ in seen] == [1, 2, 3] and 0 < seen[0][1] <= seen[2][1]
    meta_trained.meta_train(problem, Scripted(0.0), 0, meta_trained.Budget(3, seconds=0.0), watch=watch)
    assert len(seen) == 4


def test_trials_are_kept_and_gone_on_with_under_the_same_settings_only(tmp_path, capsys) -> None:
    cells = [{"rule": "a", "seed": 0}, {"rule": "a", "seed": 1}]

    def gather(made, settings=1, minutes=1.0):
        return meta_trained.gather(cells, made, {"runs": settings}, tmp_path, minutes)

    assert gather(refuse, minutes=-1.0) == []
    assert "2 of 2 trials are missing" in capsys.readouterr().out
    found = gather(lambda rule, seed: {"rows": [rule, seed]})
    assert [trial["rows"] for trial in found] == [["a", 0], ["a", 1]]
    assert gather(refuse, minutes=-1.0) == found == read_trials(tmp_path / "trials.jsonl")
    with pytest.raises(AssertionError, match="made again"):
        gather(refuse, settings=2)


def test_matches_adam_at_the_rate_that_its_tuning_finds() -> None:
    problem = meta_trained.digits_task(SmallMLP(), horizon=4)
    tuning, judging = meta_trained.runs(0, "tuning", 2), meta_trained.runs(0, "test", 3)
    best = meta_trained.at_best_rate(problem, HAND_MADE["Adam"], tuning, judging, 4)
    rule = HAND_MADE["Adam"].rule(4)
    assert best.lr == tuned(problem, rule, tuning, 4).lr
    same = curves(problem.on("test"), rule, {"lr": torch.tensor(best.lr)}, judging, 4)
    torch.testing.assert_close(best.losses, same, rtol=0, atol=0)


# -- time, memory and loss ---------------------------------------------------------------------------------------------


def test_tradeoffs_in_small_are_drawn_and_gone_on_with(tmp_path, capsys, monkeypatch) -> None:
    command = ["--smoke", "--seeds", "1", "--rules", "FactoredMLP", "LearnableAdam", "--out", str(tmp_path)]
    lopt_tradeoffs.main(command)
    first = read_trials(tmp_path / "trials.jsonl")
    assert [trial["rule"] for trial in first] == ["Adam", "Adam, cosine", "FactoredMLP", "LearnableAdam"]
    assert load_rule(tmp_path / "FactoredMLP_0.safetensors").settings["step_mult"] == 0.01
    monkeypatch.setattr(lopt_tradeoffs, "learned", refuse)
    lopt_tradeoffs.main(command)
    printed = capsys.readouterr().out
    assert "the front of the learned rules" in printed and "Adam, cosine" in printed
    assert {"table.csv", "front.png"} <= {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="rules is 'Adam'"):
        lopt_tradeoffs.main(["--rules", "Adam"])


def test_weights_are_kept_at_doublings_and_at_the_end(monkeypatch) -> None:
    def scripted(problem, estimator, seed, budget, *, window, lr, weight_decay, watch):
        assert (window, lr, weight_decay) == (20, 0.5, 0.25)
        for steps in range(1, 121):
            watch(steps, steps / 10, {"steps": torch.tensor(steps)})

    monkeypatch.setattr(lopt_tradeoffs, "meta_train", scripted)
    recipe = lopt_tradeoffs.Recipe(SmallMLP, 0.5, 2, 20, 0.25)
    found = lopt_tradeoffs.learn(recipe, SmallMLP(), lopt_tradeoffs.SMOKE, 0)
    assert [(steps, seconds, int(meta["steps"])) for steps, seconds, meta in found] == [
        (steps, steps / 10, steps) for steps in (25, 50, 100, 120)
    ]


def test_matches_the_floats_that_optimizers_keep() -> None:
    scale = lopt_tradeoffs.SMOKE
    costs = lopt_tradeoffs.step_costs({"SmallMLP": SmallMLP(), "SGD": LearnableSGD()}, scale)
    parameters = 784 * 8 + 8 + 8 * 8 + 8 + 8 * 10 + 10
    assert costs["SmallMLP"].bytes == pytest.approx(4 * 4 + 8 / parameters)  # and the count of steps
    assert costs["SGD"].bytes == 0
    assert costs["Adam"].bytes == pytest.approx(2 * 4 + 6 * 4 / parameters)  # a count for each of six tensors
    assert all(0 < cost.ns < 1e6 for cost in costs.values())


def test_a_table_says_which_rules_are_on_the_front() -> None:
    def trial(rule, seed, loss, steps=()):
        path = [{"steps": count, "mean_loss": 1.0} for count in steps]
        own = {"rule": rule, "seed": seed, "mean_loss": loss, "final_loss": loss / 2, "weights": 7}
        return own | ({"path": path, "steps": steps[-1]} if steps else {})

    losses = {"Adam": (2.0, 4.0), "SmallMLP": (1.0, 3.0), "FactoredMLP": (1.5, 2.0), "MLPRule": (1.8, 3.9)}
    steps = {"SmallMLP": (25, 50, 60), "FactoredMLP": (25, 30), "MLPRule": (25, 50, 70)}
    trials = [trial(name, seed, own[seed], steps.get(name, ())) for name, own in losses.items() for seed in (0, 1)]
    costs = {name: lopt_tradeoffs.Cost(ns, 8.0) for name, ns in zip(losses, (1.0, 2.0, 3.0, 4.0), strict=True)}
    table = lopt_tradeoffs.result_table([*trials, trial("MLPRule", 2, 0.1, (25, 70))], costs).set_index("rule")
    assert list(table["share"]) == pytest.approx([1, (0.5 + 0.75) / 2, (0.75 + 0.5) / 2, (0.9 + 0.975) / 2])
    assert list(table["equal_steps"].dropna()) == [25] * 3
    assert list(table["share_then"].dropna()) == pytest.approx([(1 / 2 + 1 / 4) / 2] * 3)
    assert list(table["dominated_by"]) == ["", "", "SmallMLP", "SmallMLP, FactoredMLP"]
    assert list(table["front_seeds"]) == [0, 2, 1, 0]
    said = lopt_tradeoffs.verdict(table.reset_index())
    assert said.startswith("FactoredMLP is dominated by SmallMLP (seed by seed on it in 1)") and said.endswith(
        ": SmallMLP"
    )
    faster = costs | {"FactoredMLP": lopt_tradeoffs.Cost(1.5, 8.0)}
    assert "FactoredMLP is on the front" in lopt_tradeoffs.verdict(lopt_tradeoffs.result_table(trials, faster))


# -- stability ---------------------------------------------------------------------------------------------------------


def test_stability_in_small_has_every_task_and_is_gone_on_with(tmp_path, capsys, monkeypatch) -> None:
    command = ["--smoke", "--seeds", "1", "--rules", "STAR", "--out", str(tmp_path)]
    star_stability.main(command)
    monkeypatch.setattr(star_stability, "learned", refuse)
    monkeypatch.setattr(star_stability, "hand_made", refuse)
    monkeypatch.setattr(star_stability, "save_training_runs", lambda frame, path: None)  # drawing takes a second
    star_stability.main(command)
    printed = capsys.readouterr().out
    star = read_trials(tmp_path / "trials.jsonl")[-1]
    places = [(star_stability.HOME, multiple) for multiple in (1, 2, 4)]
    assert [(row["task"], row["multiple"]) for row in star["rows"]] == places + [
        (name, 2) for name in star_stability.UNLIKE
    ]
    assert all(name in printed for name in ("parity", "LeNet", "Adam, cosine"))
    assert {"table.csv", "parity.csv", "longer.png", "unlike.png", "STAR_0.safetensors"} <= {
        path.name for path in tmp_path.iterdir()
    }
    with pytest.raises(ValueError, match="rules is 'Adam'"):
        star_stability.main(["--rules", "Adam"])


def test_parity_is_the_first_time_that_the_loss_is_no_larger_than_adams(tmp_path, monkeypatch) -> None:
    def scripted(problem, estimator, seed, budget, *, weight_decay, watch):
        for steps in range(1, budget.steps + 1):
            watch(steps, 0.0, steps)
        return problem.init_meta(key(0))

    monkeypatch.setattr(star_stability, "meta_train", scripted)
    monkeypatch.setattr(star_stability, "mean_loss", lambda problem, steps, *_: {2: 3.0, 4: 1.5, 6: 1.0}[steps])
    monkeypatch.setattr(star_stability, "tested", lambda *_: [])
    scale = star_stability.SMOKE._replace(steps=7, watched=2)
    found = {
        level: star_stability.learned("STAR", 0, scale, tmp_path, lambda seed, level=level: level)
        for level in (1.5, 0.5)
    }
    assert found[1.5]["way"] == [(2, 3.0), (4, 1.5), (6, 1.0)]
    assert found[1.5]["parity"] == 4 and found[0.5]["parity"] == math.inf


def test_runs_diverge_that_end_above_their_start_or_in_no_number() -> None:
    falls, rises = torch.linspace(1, 0, 40), torch.linspace(1, 1.5, 40)
    returns = torch.where(torch.arange(40) == 20, torch.inf, falls)
    losses_RT = torch.stack([falls, rises, falls * torch.nan, rises * torch.inf, returns])
    found = star_stability.measured(losses_RT)
    assert found["diverged"] == [False, True, True, True, False]
    assert found["final_loss"] == pytest.approx(float(rises[-4:].mean()))
    assert found["at"] == list(range(40)) and found["curve"][-1] == pytest.approx(1.5)


def test_a_table_of_stability_counts_runs_and_pairs_seeds() -> None:
    def row(multiple, diverged, loss):
        return {
            "task": "its own",
            "multiple": multiple,
            "diverged": diverged,
            "final_loss": loss,
            "at": [0, 9],
            "curve": [1.0, loss],
        }

    adam = [{"rule": "Adam", "rows": [row(10, [False, False], loss) for loss in (1.0, 2.0, 1.0)]}]
    ours = [
        {"rule": "STAR", "seed": 0, "parity": 20, "rows": [row(10, [False, False], 0.5)]},
        {"rule": "STAR", "seed": 1, "parity": 60, "rows": [row(10, [False, True], 4.0)]},
        {"rule": "STAR", "seed": 2, "parity": math.inf, "rows": [row(10, [True, True], math.inf)]},
    ]
    star = star_stability.result_table(adam + ours).set_index("rule").loc["STAR"]
    assert star["diverged"] == 0.5 and star["final_loss"] == 4.0 and star["ratio"] == math.inf
    assert star_stability.result_table(adam + ours[:2])["ratio"].iloc[1] == pytest.approx((0.5 + 2.0) / 2)
    parity = star_stability.parity_table(adam + ours).iloc[0]
    assert (parity["seeds"], parity["reached"], parity["median"], parity["greatest"]) == (3, 2, 60, math.inf)
    drawn = star_stability.curve_rows(adam + ours, [("its own", 10)])
    assert [(point["optimizer"], point["step"], point["loss"]) for point in drawn] == [
        ("Adam", 0, 1.0), ("Adam", 9, 1.0), ("STAR", 0, 1.0), ("STAR", 9, 4.0)
    ]  # fmt: skip


def test_a_smoke_run_leaves_what_took_hours_alone() -> None:
    parser = meta_trained.command(None, "runs/name", 1)
    folders = [meta_trained.parsed(parser, argv).out for argv in ([], ["--smoke"], ["--smoke", "--out", "here"])]
    assert [str(folder) for folder in folders] == ["runs/name", "runs/name/smoke", "here"]


# -- estimators --------------------------------------------------------------------------------------------------------


def test_estimators_in_small_are_compared_and_gone_on_with(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(pes_vs_truncated, "RATES", (0.01,))
    monkeypatch.setattr(pes_vs_truncated, "FIRST_RATES", (0.01,))
    command = ["--smoke", "--seeds", "1", "--windows", "5", "--out", str(tmp_path)]
    pes_vs_truncated.main(command)
    trials = read_trials(tmp_path / "trials.jsonl")[1:]
    assert [trial["method"] for trial in trials] == list(pes_vs_truncated.METHODS)
    assert all([point["steps"] for point in trial["way"]] == [1, 2] for trial in trials)
    assert len({trial["3x"]["mean_loss"] for trial in trials}) == 4  # windows are too few for GPES to differ from NRES
    rule, keys_R = load_rule(tmp_path / "PES_5_0.01_0.safetensors"), meta_trained.runs(0, "test", 2)
    problem = meta_trained.digits_task(SmallMLP(), horizon=10).on("test")
    again = float(curves(problem, SmallMLP(), rule.weights, keys_R, 10).mean())
    assert trials[1]["1x"]["mean_loss"] == trials[1]["way"][-1]["mean_loss"] == pytest.approx(again, rel=1e-6)
    monkeypatch.setattr(pes_vs_truncated, "learned", refuse)
    pes_vs_truncated.main(command)
    printed = capsys.readouterr().out
    assert all(method in printed for method in pes_vs_truncated.METHODS)
    assert {"table.csv", "window_5.png", "truncated_backprop_5_0.01_0.safetensors"} <= {
        path.name for path in tmp_path.iterdir()
    }
    with pytest.raises(ValueError, match="windows has 7; accepted: divisors of the horizon, 100"):
        pes_vs_truncated.main(["--windows", "7"])


def test_a_table_of_estimators_pairs_seeds_within_a_window() -> None:
    def trial(method, seed, loss, window=10, lr=0.01, validation=1.0):
        ends = {f"{multiple}x": {"mean_loss": loss / multiple, "final_loss": loss / 10} for multiple in (1, 3)}
        own = {"method": method, "seed": seed, "window": window, "lr": lr, "outer_steps": 5, "cpu_seconds": 1.0}
        own["validation"] = validation
        return own | ends | {"way": [{"steps": 5, "mean_loss": loss}]}

    trials = [trial("Adam", seed, 2.0) for seed in (0, 1)]
    trials += [trial("NRES", seed, 1.0 + seed) for seed in (0, 1)] + [trial("PES", seed, 1.2 + seed) for seed in (0, 1)]
    trials += [trial("PES", 0, 4.0, window=2), trial("NRES", 7, 1.0)]
    # Worse on validation digits, no number there, or tried on fewer seeds: none of these is the rate that is shown.
    trials += [trial("PES", seed, 0.1, lr=0.03, validation=1.1) for seed in (0, 1)]
    trials += [trial("NRES", seed, 0.1, lr=0.1, validation=math.nan) for seed in (0, 1, 7)]
    trials.append(trial("PES", 0, 0.1, lr=0.001, validation=0.9))
    rows = pes_vs_truncated.rows_of(trials)
    assert len(rows) == 5 and {row["lr"] for row in rows} == {0.01}
    table = pes_vs_truncated.result_table(rows)
    assert list(table["share_1x"]) == pytest.approx([0.75, 0.85, 2.0])
    assert list(table["share_3x"]) == pytest.approx([0.75, 0.85, 2.0])
    assert table["difference"].iloc[1] == pytest.approx(0.1)
    # One rate beyond the best is tried, where there is none yet.
    tried = {cell: pes_vs_truncated.rates_to_try(trials, cell) for cell in [(10, "NRES"), (10, "PES"), (2, "PES")]}
    assert tried[10, "NRES"] == [0.003, 0.01, 0.03, 0.1] and tried[10, "PES"] == [0.001, 0.003, 0.01, 0.03]
    assert tried[2, "PES"] == [0.003, 0.01, 0.03] and pes_vs_truncated.rates_to_try(trials, (50, "PES")) == [
        0.003,
        0.01,
    ]
    drawn = pes_vs_truncated.points(rows, 2)
    assert [(point.method, point.iteration, point.value) for point in drawn] == [("PES", 5, 2.0)]
