"""The experiment on a sweep of untrained learners; and the claim itself, at both ends of the transition (slow)."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from experiments import task_diversity
from metalearn import InContextRegressor
from metalearn.base import MetaTest
from metalearn.cli import main
from metalearn.models.saving import describe
from metalearn.models.tokens import Tokens
from metalearn.models.transformer import Transformer
from metalearn.tasks.regression import LinearRegression

CONFIG = Path(__file__).parents[2] / "configs" / "in_context" / "linear_regression.yaml"
D, LENGTH = 2, 5


def write_run(run_dir, num_tasks, seed):
    """A run folder as ``fit`` leaves it, of a learner that was never trained; the rest of the card says nothing of tasks."""
    settings = {"num_features": D, "num_tasks": num_tasks, "noise": 0.5, "seed": None}
    config = {"seed_everything": seed, "data": {"init_args": {"tasks": {"init_args": settings}}}}
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "cell.yaml").write_text(yaml.safe_dump(config))
    torch.manual_seed(seed)
    learner = Transformer(Tokens("shift", D, 1).width, 1, width=8, depth=1, heads=1, head_width=8)
    card = {"learner": describe(learner), "tokens": "shift", "num_features": D, "num_classes": 1, "length": LENGTH}
    weights = {f"learner.{name}": value for name, value in learner.state_dict().items()}
    (run_dir / "checkpoints").mkdir()
    torch.save({"state_dict": weights, "metalearn": card}, run_dir / "checkpoints" / "last.ckpt")
    return learner


@pytest.fixture
def sweep(tmp_path):
    points = [(k, seed) for k in (1, 4, 16, None) for seed in (0, 1)]
    for k, seed in points:
        write_run(tmp_path / f"{k}-{seed}", k, seed)
    cells = [
        {"cell": f"{k}-{s}", "run_dir": f"{k}-{s}", "state": "complete", "seed": s, "num_tasks": k} for k, s in points
    ]
    cells.append({"cell": "late", "run_dir": "late", "state": "failed", "seed": 2, "num_tasks": 1})
    pd.DataFrame(cells).to_csv(tmp_path / "cells.csv", index=False)
    return tmp_path


def test_matches_what_is_measured_by_hand(sweep):
    seen, unseen = task_diversity.measure(sweep / "4-1", 50)
    learner = write_run(sweep / "again", 4, 1)
    tasks = LinearRegression(D, 4, 0.5, seed=1)
    tasks.open(test=True)
    for point, stream in ((seen, "seen"), (unseen, "unseen")):
        batch = tasks.batch(0, 0, 50, LENGTH, MetaTest(stream))
        with torch.inference_mode():
            own = learner(Tokens("shift", D, 1).encode(*batch)).squeeze(-1)
        dmmse = tasks.pool_posterior_mean(*batch, range(LENGTH))
        assert point[:3] == (4, 1, stream)
        assert point.learner == pytest.approx((own - batch.y).square().mean().item(), rel=1e-5)
        assert point.from_dmmse == pytest.approx((own - dmmse).square().mean().item(), rel=1e-5)


def test_prints_every_pool_and_writes_table_and_figure(sweep, capsys):
    task_diversity.main(["--sweep_dir", str(sweep), "--sequences", "30"])
    printed = capsys.readouterr().out
    table = pd.read_csv(sweep / "task_diversity.csv")
    assert "8 of 9 cells; turns towards ridge at none" in printed and "towards_ridge" in printed
    assert table["num_tasks"].tolist() == [1, 4, 16, 1, 4, 16, math.inf] and set(table["seeds"]) == {2}
    assert (sweep / "task_diversity.png").exists() and (sweep / "task_diversity.tex").exists()


def test_refuses_a_sweep_without_results(tmp_path, capsys):
    pd.DataFrame({"cell": ["a"], "run_dir": ["a"], "state": ["failed"], "num_tasks": [1]}).to_csv(
        tmp_path / "cells.csv"
    )
    with pytest.raises(SystemExit):
        task_diversity.main(["--sweep_dir", str(tmp_path)])
    assert "no complete cell; accepted" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_few_tasks_are_remembered_and_many_are_generalised_from(tmp_path):
    """Raventós et al. 2023: the learner answers as the Bayes predictor of a pool of 2^2 does, or as that of fresh tasks."""
    points = {}
    for name, num_tasks in (("few", 4), ("many", "null")):
        chosen = ["--trainer.enable_progress_bar=false"]
        if num_tasks != "null":
            chosen.append(f"--data.init_args.tasks.init_args.num_tasks={num_tasks}")
        assert main(["fit", "-c", str(CONFIG), "--run_dir", str(tmp_path / name), *chosen]) == 0
        points[name] = {point.stream: point for point in task_diversity.measure(tmp_path / name, 512)}
    few, many = points["few"], points["many"]
    assert few["seen"].from_dmmse < 0.5 * few["seen"].from_ridge
    assert few["unseen"].towards_ridge < 0.4
    assert many["unseen"].from_ridge < 0.3 < 0.3 * few["unseen"].from_ridge
    X = np.random.default_rng(0).normal(2.0, 3.0, size=(300, 4))
    y = 100 + X @ [5.0, -1.0, 2.0, 0.0] + np.random.default_rng(1).normal(size=300)
    regressor = InContextRegressor(tmp_path / "many" / "checkpoints" / "last.ckpt", target_scale=math.sqrt(4.25))
    assert regressor.fit(X[:11], y[:11]).score(X[100:], y[100:]) > 0.7
