import pytest
import torch

from experiments import l2l_quadratics as l2l
from metalearn.analysis.trials import read_trials
from metalearn.optim.lstm import CoordinateLSTM
from metalearn.optim.saving import load_rule
from metalearn.problems.quadratics import Quadratics
from metalearn.random import fold, key


def test_smoke_prints_every_optimizer_keeps_its_trials_and_goes_on_with_what_is_missing(tmp_path, capsys):
    command = ["--smoke", "--entries", "uniform", "--out", str(tmp_path), "--seeds"]
    l2l.main([*command, "1"])
    first = read_trials(tmp_path / "trials.jsonl")
    l2l.main([*command, "2"])
    printed = capsys.readouterr().out
    both = read_trials(tmp_path / "trials.jsonl")
    assert [(trial["entries"], trial["seed"]) for trial in both] == [("uniform", 0), ("uniform", 1)]
    assert both[:1] == first
    names = {row["optimizer"] for row in both[0]["rows"]}
    assert names == {"LSTM", "Adam at 0.001"} | {name + end for name in l2l.RIVALS for end in ("", ", cosine")}
    assert all(name in printed for name in names)
    assert {"table.csv", "table.tex", "curves.png"} <= {path.name for path in tmp_path.iterdir()}
    rule = load_rule(tmp_path / "uniform_1.safetensors")
    assert rule.settings == {"layers": [20, 20], "preprocessing": "none", "scale": 1.0}


def test_meta_training_lowers_the_loss_and_keeps_the_best_weights(monkeypatch):
    scale = l2l.Scale(epochs=40, horizon=10, window=5, tasks=16, evaluations=4)
    problem, own = Quadratics(CoordinateLSTM((4,), "none", 1.0), scale.horizon), key(0, "test")
    before = problem.evaluate(problem.init_meta(fold(own, "meta")), key(1), test=False)
    seen = []

    def scripted(meta, key, *, test):
        seen.append({name: value.clone() for name, value in meta.items()})
        return {"final_loss": [3.0, 1.0, float("nan"), 2.0][len(seen) - 1]}

    with monkeypatch.context() as patched:
        patched.setattr(problem, "evaluate", scripted)
        trained = l2l.train(problem, scale, own, seconds=600.0)
    assert (trained.epoch, trained.epochs) == (20, 40)
    torch.testing.assert_close(trained.meta, seen[1], rtol=0, atol=0)
    assert problem.evaluate(seen[3], key(1), test=False)["mean_loss"] < 0.8 * before["mean_loss"]
    assert l2l.train(problem, scale, own, seconds=0.0).epochs == 1


def test_a_table_pairs_seeds_and_a_figure_has_the_better_of_two_schedules():
    def trial(seed, shift):
        ends = {"LSTM": -1.0, "Adam at 0.001": 0.0}
        ends |= {name + end: -0.5 - 0.2 * bool(end) for name in l2l.RIVALS for end in ("", ", cosine")}
        rows = [
            {"optimizer": name, "multiple": 1, "steps": 2, "lr": 0.1, "log_final": end + shift, "curve": [1.0, 0.1]}
            for name, end in ends.items()
        ]
        return {"entries": "uniform", "seed": seed, "rows": rows}

    trials = [trial(seed, 0.1 * seed) for seed in range(3)]
    table = l2l.result_table(trials).set_index("optimizer")
    assert table.loc["LSTM", "published"] == -0.70
    assert table.loc["LSTM", "log_final"] == pytest.approx(-0.9)
    assert table.loc["Adam, cosine", "difference"] == pytest.approx(0.3)
    assert {row["optimizer"] for row in l2l.curve_rows(trials)} == {"LSTM", *(f"{name}, cosine" for name in l2l.RIVALS)}


def test_refuses_options_out_of_range():
    for option, value in (("seeds", "0"), ("epochs", "0"), ("budget_minutes", "0"), ("lr", "0"), ("window", "30")):
        with pytest.raises(ValueError, match=f"{option} is {value}"):
            l2l.main([f"--{option}", value])
