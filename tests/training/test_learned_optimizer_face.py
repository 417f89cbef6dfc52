"""Learned optimizers where Lightning expects one of torch's: in code, in YAML, resumed, guarded, on two ranks."""

import functools

import pytest
import torch
import yaml
from test_cli import TINY, last
from test_resume import DDP, start
from training.conftest import weights

from metalearn import tree
from metalearn.cli import main
from metalearn.optim.guard import GL2O, LossGuard
from metalearn.optim.saving import save_rule
from metalearn.optim.small_mlp import SmallMLP
from metalearn.optim.torch_face import LearnedOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
CLASS_PATH = "metalearn.LearnedOptimizer"


@pytest.fixture
def rule():
    """Its weights are not those that it begins with."""
    rule = SmallMLP()
    rule.weights = {name: 3.0 * value for name, value in rule.weights.items()}
    return rule


def guarded(params, lr, kind, rule, **settings):
    params = list(params)
    return kind(LearnedOptimizer(params, rule, lr), torch.optim.SGD(params, lr=0.1, momentum=0.9), **settings)


@pytest.mark.parametrize(
    "optimizer",
    [LearnedOptimizer, functools.partial(guarded, kind=LossGuard, period=3), functools.partial(guarded, kind=GL2O)],
    ids=["alone", "loss", "residual"],
)
def test_resumed_run_is_bit_equal(train, tmp_path, rule, optimizer):
    """Under clipping and a schedule, and in the middle of a period."""
    model = {"optimizer": functools.partial(optimizer, rule=rule), "lr": 0.5, "warmup_steps": 6}
    train = functools.partial(train, model=model, gradient_clip_val=0.5)
    whole = train(max_steps=8)
    half = train(max_steps=5)
    half.save_checkpoint(tmp_path / "half.ckpt")
    assert not torch.equal(weights(half), weights(whole))
    resumed = train(max_steps=8, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(weights(resumed), weights(whole))
    assert_same(resumed.optimizers[0].state_dict(), whole.optimizers[0].state_dict())


def assert_same(state, other):
    """Tensors, numbers and names, bit by bit."""
    ours, theirs = tree.leaves(state), tree.leaves(other)
    assert [leaf for leaf in ours if not torch.is_tensor(leaf)] == [
        leaf for leaf in theirs if not torch.is_tensor(leaf)
    ]
    pairs = zip(*([leaf for leaf in leaves if torch.is_tensor(leaf)] for leaves in (ours, theirs)), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_matches_sgd_where_the_learned_branch_never_wins(train, rule):
    """Two closures a step leave a Lightning run what it was."""
    never = functools.partial(guarded, kind=LossGuard, rule=rule, margin=1e6)
    plain = functools.partial(torch.optim.SGD, momentum=0.9)
    ours, theirs = train(model={"optimizer": never}, max_steps=25), train(model={"optimizer": plain}, max_steps=25)
    assert torch.equal(weights(ours), weights(theirs)) and ours.optimizers[0].periods == 2


@pytest.fixture
def configured(tmp_path, rule):
    """The tiny run's config with a learned optimizer in the place of Adam."""
    save_rule(tmp_path / "rule.safetensors", rule)

    def configured(**init_args):
        config = yaml.safe_load(TINY.read_text())
        config["model"]["init_args"]["optimizer"] = {"class_path": CLASS_PATH, "init_args": init_args}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return configured


def fit(config, folder, *overrides):
    assert main(["fit", "-c", str(config), "--ckpt_path", "last", "--run_dir", str(folder), *overrides]) == 0
    return last(folder)


def test_takes_adams_place_in_yaml_and_resumes_bit_equal(configured, tmp_path, rule):
    config = configured(rule=str(tmp_path / "rule.safetensors"), weight_decay=0.01)
    whole = fit(config, tmp_path / "whole")
    fit(config, tmp_path / "parts", "--trainer.max_steps", "2")
    parts = fit(config, tmp_path / "parts")
    assert_same(parts["state_dict"], whole["state_dict"])
    assert_same(parts["optimizer_states"], whole["optimizer_states"])
    saved = whole["optimizer_states"][0]["rule"]
    assert saved["class_path"].endswith("SmallMLP")
    assert_same(saved["weights"], rule.weights)


def test_a_rule_is_chosen_by_its_class_in_yaml(configured, tmp_path):
    config = configured(rule={"class_path": "metalearn.optim.small_mlp.SmallMLP"}, lr=0.5)
    saved = fit(config, tmp_path / "run", "--trainer.max_steps", "1")["optimizer_states"][0]
    assert_same(saved["rule"]["weights"], SmallMLP().weights)


@pytest.mark.slow
def test_two_ranks_equal_one(configured, tmp_path):
    config = configured(rule=str(tmp_path / "rule.safetensors"))
    two = ("-c", DDP, "--trainer.accelerator", "cpu", "--trainer.devices", 2)
    shared = start(config, tmp_path / "shared", *two)
    assert shared.returncode == 0, shared.stderr
    assert "distributed_backend=gloo" in shared.stderr
    one, both = fit(config, tmp_path / "alone"), last(tmp_path / "shared")
    assert one["global_step"] == both["global_step"] == 4
    torch.testing.assert_close(both["state_dict"], one["state_dict"], rtol=0, atol=1e-5)
