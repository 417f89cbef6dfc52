"""A learned optimizer from its config to somebody's training loop, by the commands that the README gives."""

import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from metalearn import LearnedOptimizer
from metalearn.cli import main

CONFIG = Path(__file__).parent.parent / "configs" / "learned_optimizer" / "digits_mlp.yaml"
SMALL = [
    *("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.enable_progress_bar=false"),
    *("--model.init_args.problem.init_args.horizon=6", "--model.init_args.steps=3"),
    *("--model.init_args.runs=2", "--model.init_args.horizons=[1,2]", "--ckpt_path=last"),
]


def losses(optimizer_of, steps):
    """Of a 64-32-10 network on batches of digits."""
    torch.manual_seed(0)
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x = x.float() / 16
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer, found = optimizer_of(model.parameters()), []
    for _ in range(steps):
        rows = torch.randint(len(y), (64,))
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_a_rule_is_trained_judged_and_taken_home(tmp_path, capsys):
    arguments = ["-c", str(CONFIG), "--run_dir", str(tmp_path), *SMALL]
    assert main(["fit", *arguments]) == 0
    capsys.readouterr()
    assert main(["validate", *arguments]) == 0
    said = capsys.readouterr().out
    numbers = json.loads((tmp_path / "validation.json").read_text())
    for multiple in ("1x", "2x"):
        for name in ("ratio", "speed_up"):
            assert f"{multiple}/{name}" in said and f"{multiple}/{name}" in numbers
    for optimizer in ("learned", "Adam", "AdamW with cosine", "SGD with momentum"):
        assert optimizer in said
    assert (tmp_path / "validation.png").stat().st_size > 10_000 and str(tmp_path / "validation.png") in said
    assert len(losses(lambda params: LearnedOptimizer(params, rule=tmp_path / "rule.safetensors"), 2)) == 2


def test_the_rule_that_comes_with_the_package_trains_better_than_tuned_adam():
    ours, adam = losses(LearnedOptimizer, 100), losses(lambda params: torch.optim.Adam(params, lr=0.05), 100)
    assert ours[0] == adam[0] and sum(ours) < 0.9 * sum(adam) and sum(ours[-10:]) < 1.0
