"""The experiments on guards, dynamic modes, L2L on networks, and on everything that can be learned, head to head."""

import math

import pytest
import torch
from torch.nn import functional

from experiments import dmd_features, head_to_head, l2l_mlp, lgl2o
from experiments.meta_trained import digits_task
from metalearn import tree
from metalearn.analysis.trials import read_trials
from metalearn.base import Examples, MetaTest
from metalearn.losses.network import NetworkLoss
from metalearn.optim.lstm import CoordinateLSTM
from metalearn.optim.saving import load_rule
from metalearn.optim.small_mlp import SmallMLP
from metalearn.random import key
from metalearn.unroll import Tasks


def written(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def drawn(monkeypatch):
    """The frames of figures, which other tests draw."""
    frames = []
    for experiment in (l2l_mlp, dmd_features):
        monkeypatch.setattr(experiment, "save_training_runs", lambda frame, path: frames.append(frame))
    return frames


# -- guards ------------------------------------------------------------------------------------------------------------


def test_guards_smoke_has_ten_tasks_and_four_optimizers_and_keeps_its_trials(tmp_path, capsys):
    lgl2o.main(["--smoke", "--seeds", "1", "--period", "2", "--out", str(tmp_path)])
    [trial] = read_trials(tmp_path / "trials.jsonl")
    assert len({row["task"] for row in trial["rows"]}) == 10
    assert {row["optimizer"] for row in trial["rows"]} == {lgl2o.RULE, lgl2o.GUARD, lgl2o.LGL2O, lgl2o.OTHER}
    assert sum(row["kind"] != lgl2o.IN for row in trial["rows"]) == 8 * 4
    assert {"table.csv", "curves.png", f"rule_{lgl2o.SMOKE.horizon}_{lgl2o.SMOKE.meta_steps}_0.safetensors"} <= written(
        tmp_path
    )
    assert "ends above 1.02 x the guard alone in" in capsys.readouterr().out
    before = (tmp_path / "trials.jsonl").read_text()
    assert len(lgl2o.run(None, 1, lgl2o.SMOKE, tmp_path, math.inf)) == 1
    assert (tmp_path / "trials.jsonl").read_text() == before


def test_a_guarded_uphill_rule_goes_the_way_of_the_guard_alone():
    # The branch of a rule that goes uphill is never kept, and what it did leaves no trace: not in one bit.
    rule = SmallMLP()
    weights = {name: torch.zeros_like(value) for name, value in rule.weights.items()}
    weights["weight_0"][0, :2] = weights["weight_2"][:2, 0] = torch.tensor([1.0, -1.0])  # d = relu(g) - relu(-g)
    weights["weight_1"][:2, :2] = torch.eye(2)
    rule.weights = weights
    uphill = lgl2o.Task(lgl2o.SABOTAGED, digits_task(rule, horizon=20), uphill=True)
    made = lgl2o.optimizers(uphill, rule, 0.1, 5)
    ways = {name: lgl2o.train(uphill, make, 20, key(1)) for name, make in made.items()}
    assert ways[lgl2o.LGL2O].losses == ways[lgl2o.GUARD].losses
    assert ways[lgl2o.LGL2O].final == ways[lgl2o.GUARD].final and ways[lgl2o.LGL2O].used == 0
    assert ways[lgl2o.RULE].final > ways[lgl2o.RULE].losses[0] > ways[lgl2o.GUARD].final
    downhill = lgl2o.Task(lgl2o.IN, uphill.problem)
    assert lgl2o.train(downhill, lgl2o.optimizers(downhill, rule, 1e-9, 5)[lgl2o.LGL2O], 20, key(1)).used == 1


def test_a_negated_rule_moves_the_other_way():
    rule, layout_of = SmallMLP(output_std=1.0), {"p": torch.zeros(3)}
    grads = {"p": torch.tensor([1.0, -2.0, 0.5])}
    moved, _ = rule.update({}, grads, rule.init({}, layout_of), layout_of)
    other = lgl2o.negated(rule)
    back, _ = other.update({}, grads, other.init({}, layout_of), layout_of)
    assert torch.equal(moved["p"].sign(), -back["p"].sign()) and moved["p"].abs().min() > 0
    with pytest.raises(ValueError, match="rule is a CoordinateLSTM"):
        lgl2o.negated(CoordinateLSTM())


def test_claims_count_what_breaks_them():
    def rows(guarded, used):
        ends = {lgl2o.RULE: [0.5, 0.5], lgl2o.GUARD: [1.0, 1.0], lgl2o.LGL2O: guarded, lgl2o.OTHER: [1.0, math.inf]}
        shared = {"task": "test", "kind": lgl2o.IN, "lr": 0.1, "used": used, "curve": [2.0, 2.0]}
        return [{"optimizer": name, "final": final, **shared} for name, final in ends.items()]

    trials = [{"seed": 0, "rows": rows([0.4, 0.6], [1.0, 0.5])}, {"seed": 1, "rows": rows([1.1, 1.3], [0.0, 0.5])}]
    found = lgl2o.pairs(trials)
    assert [row["above"] for row in found] == [0, 2]
    first, second, third, fourth = lgl2o.claims(found)
    assert "in 1 of 2 tasks and seeds, at worst at 1.200 (test, seed 1); in 2 of 4 single runs" in first
    assert "in 2 of 2 tasks and seeds, at worst at inf" in second
    assert "at 1.700 x the rule alone, at most at 2.400" in third and "over all steps is 1.000 x" in third
    assert "in 0.50 of the periods, at least in 0.25" in fourth
    assert lgl2o.table_of(found).loc[0, "worst_by_guard"] == pytest.approx(1.2)


# -- L2L and dynamic modes -----------------------------------------------------------------------------------------------


def test_l2l_smoke_has_every_network_and_rival(tmp_path, capsys, monkeypatch, drawn):
    monkeypatch.setattr(l2l_mlp, "RIVALS", ("NAG", "Adam"))
    l2l_mlp.main(["--smoke", "--seeds", "1", "--out", str(tmp_path)])
    [trial] = read_trials(tmp_path / "trials.jsonl")
    rivals = {name + end for name in l2l_mlp.RIVALS for end in ("", l2l_mlp.COSINE)}
    found = {(row["network"], row["optimizer"]) for row in trial["rows"]}
    assert found == {(network, name) for network in l2l_mlp.NETWORKS for name in {"LSTM", *rivals}}
    lengths = {row["network"]: len(row["curve"]) for row in trial["rows"]}
    assert lengths == {name: 4 * network.multiple for name, network in l2l_mlp.NETWORKS.items()}
    assert load_rule(tmp_path / "digits_0.safetensors").settings["preprocessing"] == "paper"
    assert {"final_loss.csv", "mean_loss.tex"} <= written(tmp_path)
    assert "final loss on digits" in capsys.readouterr().out
    assert list(drawn[0]["problem"].unique()) == list(l2l_mlp.NETWORKS) and drawn[0]["optimizer"].nunique() >= 3


def test_meta_training_keeps_the_weights_of_its_best_evaluation(monkeypatch):
    scale = l2l_mlp.SMOKE._replace(epochs=4, evaluations=4)
    own = l2l_mlp.problem(l2l_mlp.images("digits"), l2l_mlp.Network((4,)), CoordinateLSTM((2,), "paper"), scale)
    seen, losses = [], [3.0, 1.0, math.nan, 2.0]

    def scripted(problem, rule, meta, keys_R, steps):
        seen.append(meta)
        return torch.full((1, 4), losses[len(seen) - 1])

    monkeypatch.setattr(l2l_mlp, "curves", scripted)
    trained = l2l_mlp.train(own, 0, scale, math.inf)
    assert (trained.step, trained.steps) == (4, 8)
    torch.testing.assert_close(trained.meta, seen[1], rtol=0, atol=0)
    assert not torch.equal(seen[1]["head/weight"], seen[3]["head/weight"])


def test_losses_without_bound_count_as_twenty_and_pairs_are_by_seed():
    losses = torch.tensor([[1.0] * 18 + [0.5, 0.1], [1.0] * 18 + [1e9, math.nan]])
    found = l2l_mlp.measures(losses)
    assert found["final_loss"] == pytest.approx((0.3 + 20) / 2) and found["diverged"] == 0.5
    assert found["mean_loss"] == pytest.approx((18.6 + 58) / 40)

    def row(place, name, value):
        return {"network": place, "optimizer": name, "final_loss": value}

    trials = [
        {"seed": seed, "rows": [row(place, "LSTM", seed), row(place, "Adam", seed + gain + 0.01 * seed)]}
        for seed in range(3)
        for place, gain in (("a", 1.0), ("b", -2.0))
    ]
    table = l2l_mlp.paired_table(trials, ["network"], "final_loss", "LSTM").set_index(["network", "optimizer"])
    assert table.loc[("a", "Adam"), "difference"] == pytest.approx(1.01)
    assert table.loc[("b", "Adam"), "difference_high"] < 0


def test_dynamic_modes_smoke_has_every_cell_and_equal_outer_steps(tmp_path, capsys, drawn):
    dmd_features.main(["--smoke", "--seeds", "1", "--data", "digits", "--out", str(tmp_path)])
    [trial] = read_trials(tmp_path / "trials.jsonl")
    names = {dmd_features.PLAIN, dmd_features.MODES, *dmd_features.ADAMS}
    found = {(row["network"], row["optimizer"]) for row in trial["rows"]}
    assert found == {(network, name) for network in dmd_features.NETWORKS for name in names}
    assert {cost["steps"] for cost in trial["costs"].values()} == {dmd_features.SMOKE.steps}
    assert {"final_loss.csv", "mean_loss.tex", "LSTM_with_modes_0.safetensors"} <= written(tmp_path)
    assert "LSTM with modes" in capsys.readouterr().out
    assert drawn[0].groupby(["problem", "optimizer"]).ngroups == 12


# -- head to head ------------------------------------------------------------------------------------------------------


def test_head_to_head_smoke_asks_every_method_about_the_same_tasks(tmp_path, capsys, monkeypatch):
    coarse = {
        name: (rival._replace(rates=rival.rates[::3]), factor) for name, (rival, factor) in head_to_head.RIVALS.items()
    }
    monkeypatch.setattr(head_to_head, "RIVALS", coarse)
    head_to_head.main(["--smoke", "--seeds", "1", "--out", str(tmp_path)])
    [trial] = read_trials(tmp_path / "trials.jsonl")
    names = {*head_to_head.OUTER_RATES, *coarse}
    assert {"Adam", "Adam, cosine", "Adam, 10 x the steps", "Adam, cosine, 10 x the steps"} == set(coarse)
    found = {(row["method"], row["stream"]) for row in trial["rows"]}
    assert found == {(name, stream) for name in names for stream in (head_to_head.SEEN, head_to_head.UNSEEN)}
    assert {len(row["accuracy"]) for row in trial["rows"]} == {head_to_head.SMOKE.test_tasks}
    assert {"accuracy.csv", "loss.tex"} <= written(tmp_path)
    assert "in-context learner" in capsys.readouterr().out


def test_no_method_sees_labels_of_queries_or_other_queries():
    scale = head_to_head.SMOKE._replace(validation_tasks=1)
    tasks = head_to_head.open_tasks(0)
    batch = tasks.batch(0, 0, 3, scale.support + 4, MetaTest(head_to_head.UNSEEN))
    order = torch.cat([torch.arange(scale.support), scale.support + torch.tensor([2, 0, 3, 1])])
    shuffled = batch._replace(x=batch.x[:, order], y=torch.cat([batch.y[:, : scale.support], batch.y[:, -4:] * 0], 1))
    known = [("in-context", head_to_head.in_context(tasks, 0, scale, 1e-3)[0])]
    for name, problem in head_to_head.problems(tasks, scale).items():
        known.append((name, lambda batch, p=problem: head_to_head.trained(p, p.init_meta(key(0)), batch)))
    for name, answer in known:
        first, second = answer(batch), answer(shuffled)
        torch.testing.assert_close(second, first[:, order[-4:] - scale.support], msg=lambda m, n=name: f"{n}: {m}")


def test_matches_the_rule_by_hand_on_the_gradient_of_a_learned_loss():
    scale = head_to_head.SMOKE._replace(steps=3)
    tasks = head_to_head.open_tasks(0)
    problem = head_to_head.problems(tasks, scale)["learned loss and optimizer"]
    assert problem.loss is not None
    meta = problem.init_meta(key(5))
    loss = NetworkLoss(meta["loss/weights"])
    rule = {name.removeprefix("rule/"): value for name, value in meta.items() if name.startswith("rule/")}
    together = Tasks(problem, 2)
    state, batches = together.init(meta, key(1)), together.batches(key(2), 3)
    by_hand = tree.index(state.params, 0)
    own = problem.rule.init(rule, by_hand)
    inputs, targets = (leaf[0] for leaf in batches.inner(0))
    for step in range(3):
        state, _ = together.step(meta, state, batches.inner(step), key(3))
        leaves = {name: value.detach().requires_grad_() for name, value in by_hand.items()}
        value = loss(torch.func.functional_call(problem.module, leaves, (inputs,)), targets)
        grads = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
        by_hand, own = problem.rule.update(rule, grads, own, by_hand)
    torch.testing.assert_close(tree.index(state.params, 0), by_hand)


def test_matches_gradient_descent_from_a_learned_start():
    scale = head_to_head.SMOKE._replace(steps=2)
    tasks = head_to_head.open_tasks(0)
    problem = head_to_head.problems(tasks, scale)["MAML"]
    meta = problem.init_meta(key(0))
    batch = tasks.batch(0, 0, 1, scale.support + 4, MetaTest(head_to_head.SEEN))
    params = {name.removeprefix("start/"): value for name, value in meta.items() if name.startswith("start/")}
    support = Examples(batch.x[0, : scale.support], batch.y[0, : scale.support])
    for _ in range(2):
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        value = functional.cross_entropy(
            torch.func.functional_call(problem.module, leaves, (support.inputs,)), support[1]
        )
        grads = torch.autograd.grad(value, list(leaves.values()))
        params = {name: leaves[name].detach() - 0.1 * grad for name, grad in zip(leaves, grads, strict=True)}
    expected = torch.func.functional_call(problem.module, params, (batch.x[0, scale.support :],))
    torch.testing.assert_close(head_to_head.trained(problem, meta, batch)[0], expected)


def test_tables_have_intervals_over_seeds_and_tasks():
    def row(name, accuracies):
        return {"method": name, "stream": head_to_head.SEEN, "accuracy": accuracies}

    trials = [
        {"seed": seed, "rows": [row("MAML", [0.9, 0.7 + 0.1 * seed]), row(head_to_head.ADAM, [0.5, 0.5])]}
        for seed in range(2)
    ]
    for trial in trials:
        trial["rows"] += [one | {"stream": head_to_head.UNSEEN} for one in trial["rows"]]
    table = head_to_head.result_table(trials, "accuracy").set_index(["stream", "method"])
    found = table.loc[(head_to_head.SEEN, "MAML")]
    assert found["mean"] == pytest.approx(0.825) and found["difference"] == pytest.approx(0.325)
    values = torch.tensor([0.9, 0.7, 0.9, 0.8], dtype=torch.float64)
    assert found["over_tasks"] == pytest.approx(1.96 * float(values.std()) / 2)
    assert found["low"] < 0.8 + 1e-9 and found["difference_low"] > 0


def test_options_out_of_range_are_refused():
    for main, option, value in (
        (lgl2o.main, "seeds", "0"),
        (l2l_mlp.main, "epochs", "0"),
        (dmd_features.main, "steps", "0"),
        (head_to_head.main, "seconds", "0"),
    ):
        with pytest.raises(ValueError, match=f"{option} is 0"):
            main([f"--{option}", value])
