"""The experiments on sweeps that were made by hand, in which every answer is known; and what the table adds to a sweep."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional

from experiments import gpicl_bimodality, gpicl_phases, gpicl_state_size, gpicl_table, token_format_boundary
from experiments.gpicl_table import RATE, Adaptation, Sizes
from metalearn import random, tree
from metalearn.base import Batch, MetaTest
from metalearn.estimators.unrolled import Unrolled
from metalearn.models.recurrent import LSTM
from metalearn.models.saving import describe
from metalearn.models.tokens import Tokens
from metalearn.models.vision import MLP
from metalearn.tasks.images import ProjectedImages
from metalearn.tasks.sources import ImageSource
from metalearn.unroll import Tasks

CHANCE, LENGTH = 0.2, 6


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Writes rows as a sweep leaves them; ``metalearn sweep`` then has nothing left to do."""
    commands = []
    monkeypatch.setattr(gpicl_phases, "metalearn", lambda arguments: commands.append(arguments) or 0)

    def plant(rows):
        rows = [{"cell": str(i), "run_dir": f"runs/{i}", "state": "complete"} | row for i, row in enumerate(rows)]
        pd.DataFrame(rows).to_csv(tmp_path / "cells.csv", index=False)
        return tmp_path

    plant.commands = commands
    return plant


def accuracies(seen, unseen, first=CHANCE):
    streams = {"seen_train": seen, "unseen_held_out": unseen, "unseen_classes": unseen - 0.1}
    numbers = {}
    for stream, last in streams.items():
        ends = {"accuracy_first": first, "accuracy_last": last, "improvement": last - first, "loss": 1 - last}
        numbers |= {f"validation/{stream}/{name}": value for name, value in ends.items()}
    return numbers | {"train/loss": 0.5}


def jump(num_tasks, edge, noise):
    return (CHANCE if num_tasks < edge else 0.8) + noise


def read(path):
    return pd.read_csv(path)


def test_phases_find_the_planted_edges(plant, monkeypatch, capsys):
    noise = np.random.default_rng(0).normal(0, 0.01, 1000).tolist()
    edges = {16: math.sqrt(2) * 64, 64: math.sqrt(2) * 16}
    grid = [(s, k, w) for s in range(3) for k in (4, 8, 16, 32, 64, 128, 256, 512) for w in edges]
    folder = plant(
        {"seed": s, "num_tasks": k, "width": w} | accuracies(0.9, jump(k, edges[w], noise.pop())) for s, k, w in grid
    )
    monkeypatch.setattr(gpicl_phases, "load_learner", lambda path: (None, {"num_classes": 5}, {}))
    gpicl_phases.main(["--sweep_dir", str(folder), "--mlp", "--workers", "2"])
    table = read(folder / "critical.csv").set_index(["stream", "width"])
    for width, edge in edges.items():
        for stream in ("unseen_held_out", "unseen_classes"):
            row = table.loc[(stream, width)]
            assert row["low"] <= edge <= row["high"] and row["estimate"] == pytest.approx(edge, rel=0.5)
            assert (row["seeds"], row["cells"]) == (3, 24)
    regime = read(folder / "regimes.csv").set_index("num_tasks")["regime"]
    assert set(regime.loc[:16]) == {"identification"} and set(regime.loc[32:]) == {"learning-to-learn"}
    assert (folder / "transitions.png").stat().st_size > 0
    [command] = plant.commands
    assert command[0] == "sweep" and command[-2:] == ["--set", gpicl_phases.MLP] and command[4:6] == ["--workers", "2"]
    assert "48 of 48 cells, 3 seeds" in capsys.readouterr().out


def test_bimodality_is_found_where_it_was_planted(plant):
    spread = np.linspace(-0.02, 0.02, 20)
    rows = []
    for seed in range(20):
        two = (0.25 if seed % 2 else 0.75) + spread[seed]
        rows += [{"seed": seed, "num_tasks": 64} | accuracies(two, two)]
        rows += [{"seed": seed, "num_tasks": 128} | accuracies(0.75 + spread[seed], 0.75 + spread[seed])]
    folder = plant(rows)
    gpicl_bimodality.main(["--sweep_dir", str(folder)])
    for name, lower in (("loss", 0.25), ("accuracy", 0.25)):
        table = read(folder / f"bimodality_{name}.csv").set_index("num_tasks")
        assert table.loc[64, "p"] < table.loc[64, "p_holm"] < 0.01 and table.loc[128, "p"] > 0.5
        assert table.loc[64, ["lower", "values"]].tolist() == pytest.approx([lower, 20], abs=0.02)
    assert (folder / "bimodality.png").stat().st_size > 0


@pytest.mark.parametrize("which", ["state_size", "parameters"])
def test_state_size_tells_which_size_was_planted(plant, which):
    rows = []
    for number in range(12):
        sizes = {"model/state_size": 2.0 ** (number + 3), "model/parameters": 100.0 * (1 + 7 * number % 12)}
        rank = sorted([2.0 ** (i + 3) if which == "state_size" else 100.0 * (1 + 7 * i % 12) for i in range(12)])
        last = CHANCE + 0.06 * rank.index(sizes[f"model/{which}"])
        for seed in range(3):
            row = {"seed": seed, "learner": f"kind{number % 3} {number}"} | sizes
            rows.append(row | accuracies(last, last + 0.001 * seed))
    folder = plant(rows)
    gpicl_state_size.main(["--sweep_dir", str(folder)])
    table = read(folder / "correlations.csv").set_index("stream").loc["unseen_held_out"]
    assert table["state" if which == "state_size" else "parameters"] == pytest.approx(1)
    assert table["low"] > 0 if which == "state_size" else table["high"] < 0
    learners = read(folder / "state_size.csv").set_index("learner")
    assert learners["seeds"].tolist() == [3] * 12 and learners["chance"].sum() == 3
    assert (folder / "state_size.png").stat().st_size > 0


def test_token_formats_have_the_planted_distance(plant, capsys):
    edges = {"shift": 32 * math.sqrt(2), "paper": 512 * math.sqrt(2)}
    counts = [16, 32, 64, 128, 256, 512, 1024, 2048]
    grid = [(s, t, k) for s in range(2) for t in edges for k in counts]
    folder = plant(
        {"seed": s, "tokens": t, "num_tasks": k} | accuracies(0.9, jump(k, edges[t], 0.01 * s)) for s, t, k in grid
    )
    logs = [
        {"cell": str(cell), "metric": "train/loss", "step": step, "value": 1.6 if step < 100 * (cell % 2 + 1) else 0.9}
        for cell in range(len(grid))
        for step in range(0, 400, 10)
    ]
    pd.DataFrame(logs).to_csv(folder / "logs.csv", index=False)
    token_format_boundary.main(["--sweep_dir", str(folder)])
    table = read(folder / "boundary.csv").set_index("tokens")
    for tokens, edge in edges.items():
        assert table.loc[tokens, "low"] <= edge <= table.loc[tokens, "high"]
    assert "the edge of the paper's tokens is 4 octaves [" in capsys.readouterr().out
    assert len(read(folder / "plateaus.csv")) == 16 and (folder / "boundary.png").stat().st_size > 0


def test_a_sweep_that_is_refused_ends_the_experiment(plant, monkeypatch):
    monkeypatch.setattr(gpicl_phases, "metalearn", lambda arguments: 2)
    with pytest.raises(SystemExit) as ended:
        gpicl_bimodality.main(["--sweep_dir", "nowhere", "--workers", "none"])
    assert ended.value.code == 2


# -- the table -------------------------------------------------------------------------------------------------------


def sequences(num_tasks=3, length=LENGTH, dtype=torch.float64):
    x = random.normal(random.key(0, "x"), (num_tasks, length, 4)).to(dtype)
    return Batch(x, random.integers(random.key(0, "y"), (num_tasks, length), 3))


def by_autograd(module, meta, x, y, steps):
    """The parameters after ``steps`` of gradient descent on (x, y), by plain autograd, differentiably."""
    params = {name: value for name, value in meta.items() if name != RATE}
    for _ in range(steps):
        loss = functional.cross_entropy(torch.func.functional_call(module, params, (x,)), y)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {n: p - meta[RATE].exp() * g for (n, p), g in zip(params.items(), grads, strict=True)}
    return params


def test_adaptation_and_its_meta_gradient_match_plain_autograd():
    module, batch = MLP(4, 3, (5,)).double(), sequences()
    problem = Adaptation(module, horizon=3, lr=0.5)
    meta = {n: v.double().requires_grad_() for n, v in problem.init_meta(random.key(1)).items()}
    losses, answers = [], []
    for x, y in zip(*batch, strict=True):
        end = by_autograd(module, meta, x[:-1], y[:-1], 3)
        logits = torch.func.functional_call(module, end, (x[-1:],))
        losses.append(functional.cross_entropy(logits, y[-1:]))
        answers.append(logits.argmax())
    exact = torch.autograd.grad(torch.stack(losses).mean(), list(meta.values()))
    batches = gpicl_table.split(batch, LENGTH - 1, 3)
    found = Unrolled(mode="graph").estimate(Tasks(problem, 3), tree.detach(meta), {}, batches, random.key(2))
    for name, grad in zip(meta, exact, strict=True):
        torch.testing.assert_close(found.grad[name], grad, rtol=1e-9, atol=1e-12)
    assert gpicl_table.adapted(problem, tree.detach(meta), batch).tolist() == torch.stack(answers).tolist()


def test_adaptation_never_reads_the_last_label():
    problem, batch = Adaptation(MLP(4, 3, ()), horizon=2, lr=0.5), sequences(dtype=torch.float32)
    meta, other = problem.init_meta(random.key(1)), batch.y.clone()
    other[:, -1] = (other[:, -1] + 1) % 3
    answers = gpicl_table.adapted(problem, meta, batch)
    assert torch.equal(answers, gpicl_table.adapted(problem, meta, batch._replace(y=other)))


@pytest.fixture
def digits():
    tasks = ProjectedImages(ImageSource("digits", classes=[0, 1, 2]), 4, seed=3)
    tasks.open(test=True)
    return tasks


def accuracy(answer, tasks, sequences=300):
    batch = tasks.batch(0, 0, sequences, LENGTH, MetaTest("unseen_held_out"))
    return float((answer(batch) == batch.y[:, -1]).double().mean())


class SameEveryTime:
    """One task only: the class is the largest of the first three features."""

    num_features, num_classes = 4, 3

    def batch(self, step, first, tasks, length, split):
        x = random.normal(random.key(5, type(split).__name__, step), (tasks, length, self.num_features))
        return Batch(x, x[..., : self.num_classes].argmax(-1))

    def accuracy(self, meta_steps):
        sizes = Sizes(meta_steps=meta_steps, meta_batch=32, queries=8, adapt_steps=1)
        batch = self.batch(0, 0, 300, LENGTH, MetaTest("same"))
        right = gpicl_table.maml(self, LENGTH, 0, sizes)(batch) == batch.y[:, -1]
        return float(right.double().mean())


def test_maml_learns_before_the_first_example_what_all_tasks_share():
    assert SameEveryTime().accuracy(0) < 0.6 < 0.85 < SameEveryTime().accuracy(60)


def test_sgd_takes_the_way_that_is_best_on_validation_sequences(digits, monkeypatch):
    monkeypatch.setattr(gpicl_table, "RATES", (0.0, 0.3))
    monkeypatch.setattr(gpicl_table, "HORIZONS", (20,))
    answer = gpicl_table.sgd("linear", digits, LENGTH, 0, Sizes(sequences=100))
    assert answer.args[0].lr == pytest.approx(0.3)
    assert accuracy(answer, digits) > 0.5


def write_run(folder, seed):
    """A run folder as ``fit`` leaves it, of a learner that was never trained."""
    source = {"class_path": "ImageSource", "init_args": {"path": "digits", "classes": [0, 1, 2]}}
    tasks = {"class_path": "ProjectedImages", "init_args": {"source": source, "num_features": 4, "seed": seed}}
    config = {"data": {"init_args": {"tasks": tasks, "length": LENGTH}}}
    (folder / "logs" / "version_0").mkdir(parents=True)
    (folder / "logs" / "version_0" / "config.yaml").write_text(repr(config))
    torch.manual_seed(seed)
    learner = LSTM(Tokens("shift", 4, 3).width, 3, width=5)
    card = {"learner": describe(learner), "tokens": "shift", "num_features": 4, "num_classes": 3, "length": LENGTH}
    weights = {f"learner.{name}": value for name, value in learner.state_dict().items()}
    (folder / "checkpoints").mkdir()
    torch.save({"state_dict": weights, "metalearn": card}, folder / "checkpoints" / "last.ckpt")
    return learner


def test_table_has_every_method_on_the_same_sequences(plant, digits, monkeypatch, capsys):
    folder = plant([{"seed": seed, "learner": "LSTM"} for seed in (3, 4)])
    learner, _ = (write_run(folder / "runs" / str(i), seed) for i, seed in enumerate((3, 4)))
    monkeypatch.setattr(gpicl_table, "HORIZONS", (2,))
    sizes = Sizes(sequences=40, meta_steps=2, meta_batch=4, queries=2, adapt_steps=2)
    gpicl_table.main(["--sweep_dir", str(folder), "--budget_minutes", "1"], sizes)
    assert plant.commands[0][-1] == "--budget_minutes=1.0"
    trials = gpicl_table.read_trials(folder / "trials.jsonl")
    found = {(trial["method"], trial["seed"]): trial["unseen_held_out"] for trial in trials}
    assert {seed for _, seed in found} == {3, 4} and len(found) == 2 * 7
    batch = digits.batch(0, 0, 40, LENGTH, MetaTest("unseen_held_out"))
    with torch.inference_mode():
        own = learner(Tokens("shift", 4, 3).encode(*batch))[:, -1].argmax(-1)
    nearest = digits.oracles()["1-nearest-neighbour"](*batch, [LENGTH - 1])[:, 0]
    for method, answers in (("LSTM", own), ("1-nearest-neighbour", nearest)):
        assert found[method, 3] == pytest.approx(100 * float((answers == batch.y[:, -1]).double().mean()))
    gpicl_table.main(["--sweep_dir", str(folder)], sizes)  # from what was kept
    assert gpicl_table.read_trials(folder / "trials.jsonl") == trials
    assert set(read(folder / "table.csv")["method"]) == {method for method, _ in found}
    assert "1-nearest-neighbour" in capsys.readouterr().out


def test_published_numbers_stand_beside_runs(tmp_path, capsys):
    row = "unseen_held_out,learner,99,1024,0.7,0.01\n"
    (tmp_path / "test.csv").write_text("stream,method,position,sequences,accuracy,standard_error\n" + row)
    gpicl_table.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "70.0 ± 1.0" in printed and "53.7" in printed and "paper, LSTM" in printed


@pytest.mark.parametrize("arguments", [[], ["runs/x", "--sweep_dir", "runs/y"]])
def test_table_wants_one_kind_of_runs(arguments, capsys):
    with pytest.raises(SystemExit):
        gpicl_table.main(arguments)
    assert "accepted: one of them" in capsys.readouterr().err
