"""The Lightning side of multilevel programs: steps that are counted, settings that are refused, runs that stop and go on."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from pytorch_lightning.callbacks import EarlyStopping
from torch import Tensor, nn
from training.conftest import Stop

from metalearn import random, tree
from metalearn.cli import main
from metalearn.models.vision import MLP
from metalearn.multilevel import Graph, Problem
from metalearn.optim.first_order import SGD, Adam
from metalearn.training.callbacks import Budget, RunCheckpoint
from metalearn.training.meta_gradient import OuterSteps
from metalearn.training.multilevel import MultilevelLearning

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
DDP = Path(__file__).parents[2] / "configs" / "hardware" / "ddp.yaml"


class Vector(nn.Module):
    def __init__(self, size=3):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def reset_parameters(self):
        nn.init.normal_(self.value)


def noise(key) -> Tensor:
    return random.normal(key, (3,)).double()


def inner(nets, batch) -> Tensor:
    return (nets.lower.params["value"] - nets.upper.params["value"] - batch).square().sum()


def outer(nets, batch) -> Tensor:
    return (nets.lower.params["value"] - 1).square().sum()


def two_levels(name="upper", unroll_steps=3, accumulate=1):
    """The upper's parameters move the lower's to 1."""
    below = Problem("lower", Vector(), SGD(lr=0.1), inner, noise, unroll_steps, accumulate=accumulate)
    above = Problem(name, Vector(), Adam(lr=0.1), outer, validation=lambda nets: {"loss": float(outer(nets, None))})
    return Graph([above, below], {name: ["lower"]}, {"lower": [name]})


@pytest.fixture
def learn(make_trainer):
    """``learn(callbacks, …, program=…, ckpt_path=…, **trainer options)`` trains and returns the module."""

    def learn(*callbacks, program=None, ckpt_path=None, seed=0, **options):
        module = MultilevelLearning(program or two_levels())
        make_trainer(*callbacks, **options).fit(module, OuterSteps(seed), ckpt_path=ckpt_path)
        return module

    return learn


def test_matches_the_graph_stepped_by_hand(learn):
    module = learn(max_steps=4)
    graph, key = two_levels(), random.key(0, "step", 0)
    state = graph.init(random.key(0, "init", 0))
    for _ in range(4):
        state, log = graph.step(state, key)
    torch.testing.assert_close(module.state, state, rtol=0, atol=0)
    torch.testing.assert_close(module.learned["upper:value"].detach(), state["levels"]["upper"].params["value"])
    logged = module.trainer.callback_metrics
    assert not logged  # every fiftieth step only
    assert module.trainer.global_step == 4
    once = learn(max_steps=4, log_every_n_steps=4).trainer.callback_metrics
    torch.testing.assert_close(once["train/upper/loss"].double(), log["upper/loss"].double(), rtol=1e-6, atol=0)


def test_steps_are_counted_for_budget_and_validation(learn):
    budget = Budget()
    options = {"limit_val_batches": None, "val_check_interval": 2, "check_val_every_n_epoch": None}
    module = learn(budget, max_steps=4, program=two_levels(accumulate=2), **options)
    assert budget.spent["tokens"] == 4 * (3 + 1) and budget.spent["gradient_evaluations"] == 4 * (3 * 2 + 1)
    params = module.state["levels"]["lower"].params
    wanted = (params["value"] - 1).square().sum()
    torch.testing.assert_close(module.trainer.callback_metrics["validation/upper/loss"].double(), wanted)


def test_stops_early_by_what_the_problems_validate(learn):
    options = {"limit_val_batches": None, "val_check_interval": 1, "check_val_every_n_epoch": None, "max_steps": 9}
    early = EarlyStopping("validation/upper/loss", mode="max", patience=2)  # the loss falls: twice in vain
    assert learn(early, **options).trainer.global_step == 3


def test_decreases_the_loss_of_the_top(learn):
    first, last = (
        float((learn(max_steps=steps).state["levels"]["lower"].params["value"] - 1).square().sum()) for steps in (1, 60)
    )
    assert last < first / 10


def test_resumed_run_is_bit_equal(learn, tmp_path):
    whole = learn(max_steps=6)
    with pytest.raises(SystemExit):
        learn(RunCheckpoint(str(tmp_path), 2), Stop(3), max_steps=6, enable_checkpointing=True)
    last = tmp_path / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    assert saved["global_step"] == 2 and int(saved["levels"]["step"]) == 2
    resumed = learn(RunCheckpoint(str(tmp_path), 2), ckpt_path=last, max_steps=6, enable_checkpointing=True)
    torch.testing.assert_close(tree.pack(resumed.state), tree.pack(whole.state), rtol=0, atol=0)
    torch.testing.assert_close(dict(resumed.learned), dict(whole.learned), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "trained with seed 0, not 1"),
        ({"program": two_levels(unroll_steps=2)}, "trained with graph .*3 steps.*, not .*2 steps"),
        ({"program": two_levels("top")}, "trained with graph"),
    ],
)
def test_checkpoint_of_another_program_is_refused(learn, tmp_path, options, message):
    learn(RunCheckpoint(str(tmp_path), 2), max_steps=2, enable_checkpointing=True)
    with pytest.raises(ValueError, match=f"(?s){message}.*accepted: the same"):
        learn(ckpt_path=tmp_path / "checkpoints" / "last.ckpt", max_steps=4, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": 1.0}, "gradient_clip_val is 1.0.*Clipped"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches is 2.*accumulate of a problem"),
        ({"precision": "bf16-mixed"}, "precision is bf16-mixed.*precision of a problem"),
    ],
)
def test_settings_that_belong_to_the_problems_are_refused(learn, options, message):
    with pytest.raises(ValueError, match=message):
        learn(**options)


def test_a_graph_alone_has_no_test_part(make_trainer):
    with pytest.raises(ValueError, match="no test data; accepted: validate, or a Program"):
        make_trainer().test(MultilevelLearning(two_levels()), OuterSteps(0))


# -- the command line ------------------------------------------------------------------------------------------------

REWEIGHTING = {
    "seed_everything": 0,
    "trainer": {"max_steps": 3, "log_every_n_steps": 1, "val_check_interval": 3, "enable_progress_bar": False},
    "model": {
        "class_path": "MultilevelLearning",
        "init_args": {
            "program": {
                "class_path": "Reweighting",
                "init_args": {
                    "source": {"class_path": "ImageSource", "init_args": {"path": "digits"}},
                    "model": {"class_path": "MLP", "init_args": {"hidden": [8]}},
                    "rule": {"class_path": "SGD", "init_args": {"lr": 0.5, "momentum": 0.9}},
                    "weights_rule": {"class_path": "SGD", "init_args": {"lr": 1.0}},
                    "batch_size": 64,
                    "meta_batch_size": 50,
                    "unroll_steps": 2,
                    "estimator": {"class_path": "Unrolled", "init_args": {"mode": "store"}},
                },
            }
        },
    },
    "data": {"class_path": "OuterSteps"},
}
A_GRAPH = """
model:
  class_path: MultilevelLearning
  init_args:
    program:
      class_path: Graph
      init_args:
        problems:
        - class_path: Problem
          init_args: {name: upper, module: &module {class_path: training.test_multilevel.Vector},
                      rule: {class_path: Adam, init_args: {lr: 0.1}}, loss: training.test_multilevel.outer}
        - class_path: Problem
          init_args: {name: lower, module: *module, rule: {class_path: SGD, init_args: {lr: 0.1}}, unroll_steps: 3,
                      loss: training.test_multilevel.inner, data: training.test_multilevel.noise,
                      estimator: {class_path: ConjugateGradient}}
        upper_to_lower: {upper: [lower]}
        lower_to_upper: {lower: [upper]}
data: {class_path: OuterSteps}
trainer: {max_steps: 2, accelerator: cpu, enable_progress_bar: false}
"""


def last(run_dir):
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_graph_is_written_in_yaml(tmp_path):
    config = tmp_path / "graph.yaml"
    config.write_text(A_GRAPH)
    assert main(["fit", "-c", str(config), "--run_dir", str(tmp_path / "run")]) == 0
    saved = last(tmp_path / "run")
    assert "ConjugateGradient" in saved["program"]["graph"] and int(saved["levels"]["levels/lower/step"]) == 6


def test_two_ranks_equal_one(tmp_path):
    config = tmp_path / "reweighting.yaml"
    config.write_text(yaml.safe_dump(REWEIGHTING))
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    fit = functools.partial(list, ["fit", "-c", str(config), "--trainer.accelerator", "cpu", "--run_dir"])
    assert main([*fit(), str(alone)]) == 0
    arguments = [sys.executable, "-m", "metalearn", *fit(), str(shared), "-c", str(DDP), "--trainer.accelerator", "cpu"]
    done = subprocess.run(
        [*arguments, "--trainer.devices", "2"], env=os.environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "distributed_backend=gloo" in done.stderr
    one, two = last(alone), last(shared)
    assert one["global_step"] == two["global_step"] == 3
    torch.testing.assert_close(two["levels"], one["levels"], rtol=0, atol=1e-6)
    moved = one["levels"]["levels/weights/params/0.weight"] - initial_weights()
    assert float(moved.norm()) > 1e-4


def initial_weights():
    """The first layer of the weighting network before training."""
    key = random.fold(random.key(0, "init", 0), "init", "weights")
    return tree.initialise(MLP(1, 1, [100], "relu"), key)[0]["0.weight"]
