"""Tuning a loss: what is written for its user, what evaluations compare, and runs that stop and go on."""

import functools
import json

import pytest
import torch
from estimators.conftest import ridge
from problems.conftest import Clusters
from training.conftest import Stop

from metalearn import random
from metalearn.base import Loss
from metalearn.cli import main
from metalearn.estimators.forward import ForwardMode
from metalearn.estimators.unrolled import Unrolled
from metalearn.losses.learned import LearnedLoss, load_loss
from metalearn.losses.network import NetworkLoss
from metalearn.losses.taylor import TaylorLoss
from metalearn.models.vision import MLP
from metalearn.optim import first_order
from metalearn.problems.learned_loss import LossTask
from metalearn.training.callbacks import RunCheckpoint
from metalearn.training.loss_tuning import BEST, LossTuning
from metalearn.training.meta_gradient import OuterSteps
from metalearn.unroll import Tasks

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
SQUARED = "square(sub(y,p))"
MLP_8 = functools.partial(MLP, hidden=(8,))


def task(loss=SQUARED, lr=0.3, **options):
    options = dict(horizon=5, batch_size=10, outer_batch_size=12, evaluation_runs=2) | options
    return LossTask(Clusters(), MLP_8, first_order.SGD(lr), loss, **options)


@pytest.fixture
def tune(make_trainer):
    """Tune on clusters: ``tune(callbacks…, loss=…, estimator=…, max_steps=…)`` returns the module."""

    def tune(
        *callbacks, problem=None, estimator=None, steps=5, loss=SQUARED, ckpt_path=None, lr=0.05, seed=0, **options
    ):
        build = functools.partial(torch.optim.Adam, lr=lr)
        module = LossTuning(problem or task(loss), estimator or Unrolled(), steps, build)
        make_trainer(*callbacks, **options).fit(module, OuterSteps(seed), ckpt_path=ckpt_path)
        return module

    return tune


@pytest.mark.parametrize(
    "loss",
    [
        SQUARED,
        TaylorLoss([0.3, -0.5, 0.1, 0.2, -1.0, 0.4, 0.1, 0.2]),
        NetworkLoss(activation="smooth_leaky_relu"),
    ],
    ids=["program", "taylor", "network"],
)
def test_the_loss_that_is_written_is_the_one_that_was_tuned(tune, tmp_path, loss):
    module = tune(loss=loss, max_steps=3)
    written = load_loss(str(tmp_path / BEST))
    began = module.task.loss
    z, y = random.normal(random.key(1), (7, 3)), torch.arange(7) % 3
    torch.testing.assert_close(written(z, y), module.tuned(z, y), rtol=0, atol=0)
    assert torch.equal(written.weights, module.meta["weights"]) and not torch.equal(written.weights, began.weights)
    said = json.loads((tmp_path / BEST).read_text())["provenance"]["tuning"]
    assert (said["seed"], said["step"], said["task"]["source"], said["task"]["model"]) == (
        0,
        3,
        "Clusters",
        "MLP",
    )


def test_matches_descent_written_out(tune):
    """Two steps of Adam on the estimates of the same keys, which are those of the outer steps."""
    problem = task()
    module = tune(problem=problem, estimator=ForwardMode(), max_steps=2, lr=0.1)
    weights = torch.nn.Parameter(torch.ones(LearnedLoss(SQUARED).program.num_weights))
    optimizer, estimator = torch.optim.Adam([weights], lr=0.1), Unrolled("graph")
    for number in range(2):
        key = OuterSteps(0).key("step", number, torch.device("cpu"))
        batches = problem.batches(random.fold(key, "data"), 5)
        meta = {"weights": weights.detach()}
        weights.grad = estimator.estimate(problem, meta, {}, batches, random.fold(key, "estimate")).grad["weights"]
        optimizer.step()
    torch.testing.assert_close(module.meta["weights"], weights.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "online"])
def test_resumed_run_is_bit_equal(tune, tmp_path, warm):
    """An evaluation between the checkpoint and the kill, too: the file that is taken home is the same byte by byte."""
    problem = functools.partial(task, evaluation_steps=4, horizon=None if warm else 3)
    options = {
        "estimator": Unrolled(warm_start=warm),
        "steps": 1 if warm else 3,
        "max_steps": 6,
        "limit_val_batches": 1,
    }
    options |= {"val_check_interval": 5, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    options |= {"enable_checkpointing": True}
    whole = tune(RunCheckpoint(str(tmp_path / "whole"), 2), problem=problem(), **options)
    wanted = (tmp_path / BEST).read_text()
    (tmp_path / BEST).unlink()
    with pytest.raises(SystemExit):
        tune(RunCheckpoint(str(tmp_path), 2), Stop(3), problem=problem(), **options)
    early = json.loads((tmp_path / BEST).read_text())
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == early["provenance"]["tuning"]["step"] == 2
    resumed = tune(RunCheckpoint(str(tmp_path), 2), problem=problem(), ckpt_path=last, **options)
    torch.testing.assert_close(resumed.meta, whole.meta, rtol=0, atol=0)
    torch.testing.assert_close(resumed.estimator_state, whole.estimator_state, rtol=0, atol=0)
    assert (tmp_path / BEST).read_text() == wanted
    assert json.loads(wanted)["provenance"]["tuning"]["evaluation"]["step"] == 5


def test_tuning_improves_what_runs_under_the_loss_learn(tune, tmp_path):
    """From a loss that is nearly flat: the tuned one teaches more in the same steps."""
    problem = task(LearnedLoss(SQUARED, weights=[0.1, 0.2, 0.2]), evaluation_runs=3)
    module = tune(problem=Tasks(problem, 2), max_steps=20, lr=0.2)
    found = problem.evaluate(module.meta, random.key(5), test=False)
    assert found["loss_tuned"] < found["loss_initial"] - 0.1


def test_a_checkpoint_of_another_loss_is_refused(tune, tmp_path):
    keep = functools.partial(tune, RunCheckpoint(str(tmp_path), 2), enable_checkpointing=True)
    keep(max_steps=2)
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match=r"LossTask of .*square\(sub\(y,p\)\).*, not LossTask of .*abs"):
        keep(max_steps=4, ckpt_path=last, loss="abs(sub(y,p))")


class Own(Loss):
    output = "softmax"

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def per_example(self, prediction_NK, target_NK):
        return self.scale * (prediction_NK - target_NK).square().sum(-1)

    def forward(self, prediction, target):
        return self.per_example(prediction, torch.nn.functional.one_hot(target, 3)).mean()


def test_refuses_what_cannot_be_tuned_or_taken_home(tune):
    with pytest.raises(ValueError, match="problem is Ridge; accepted: LossTask, or Tasks of a LossTask"):
        LossTuning(ridge()[0], Unrolled(), 5, functools.partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match="which has no parameters; accepted: one with parameters"):
        tune(loss="cross_entropy")
    with pytest.raises(ValueError, match="the loss is Own, which cannot be saved; accepted: an ElementwiseLoss"):
        tune(loss=Own())


CONFIG = """
seed_everything: 0
trainer: {accelerator: cpu, max_steps: 2, log_every_n_steps: 1, val_check_interval: 2, enable_progress_bar: false}
model:
  class_path: LossTuning
  init_args:
    problem:
      class_path: LossTask
      init_args:
        source: {class_path: ImageSource, init_args: {path: digits, classes: [0, 1, 2]}}
        model: {class_path: MLP, init_args: {hidden: [8]}}
        rule: {class_path: SGD, init_args: {lr: 0.1}}
        loss: LOSS
        horizon: 3
        batch_size: 20
        outer_batch_size: 16
        evaluation_runs: 2
    estimator: {class_path: Unrolled}
    steps: 3
    optimizer: {class_path: torch.optim.Adam, init_args: {lr: 1.0e-2}}
data: {class_path: OuterSteps}
"""


@pytest.mark.parametrize(
    "loss",
    ["mul(-1,mul(y,log(p)))", "{class_path: NetworkLoss, init_args: {activation: smooth_leaky_relu}}"],
    ids=["text", "class"],
)
def test_the_command_line_tunes_tests_and_tunes_what_was_tuned(tmp_path, capsys, loss):
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(CONFIG.replace("LOSS", loss))
    for command in ("fit", "test"):
        assert main([command, "-c", str(config), "--run_dir", str(run), "--ckpt_path", "last"]) == 0
    found = json.loads((run / "test.json").read_text())
    assert found.keys() == {f"{what}_{name}" for what in ("loss", "error") for name in ("tuned", "initial", "own")}
    assert found["loss_tuned"] != found["loss_initial"] and "test/error_tuned" in capsys.readouterr().out
    config.write_text(CONFIG.replace("LOSS", str(run / BEST)))
    assert main(["fit", "-c", str(config), "--run_dir", str(tmp_path / "again")]) == 0
    first, second = (load_loss(folder / BEST).weights for folder in (run, tmp_path / "again"))
    assert first.shape == second.shape and not torch.equal(first, second) and torch.allclose(first, second, atol=0.1)
