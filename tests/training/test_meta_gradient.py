"""The Lightning side of meta-gradients: what the Trainer does to an estimate, and runs that stop and go on."""

import functools
from types import SimpleNamespace

import pytest
import torch
from estimators.conftest import ridge
from pytorch_lightning.strategies import FSDPStrategy
from training.conftest import Stop

from metalearn.estimators.forward import ForwardGradient, ZerothOrder
from metalearn.estimators.unrolled import Unrolled
from metalearn.optim import first_order
from metalearn.problems.hyperparameters import RandomRidge
from metalearn.random import fold
from metalearn.training.callbacks import RunCheckpoint
from metalearn.training.meta_gradient import MetaGradientLearning, OuterSteps

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
SGD = functools.partial(torch.optim.SGD, lr=0.5)


@pytest.fixture
def learn(make_trainer):
    """Train on the ridge problem: ``learn(estimator, problem=…, steps=…, max_steps=…, …)`` returns the module."""

    def learn(
        *callbacks,
        estimator=None,
        problem=None,
        steps=5,
        optimizer=SGD,
        ckpt_path=None,
        seed=0,
        lr_scheduler=None,
        **options,
    ):
        problem = problem or ridge()[0]
        module = MetaGradientLearning(problem, estimator or Unrolled(), steps, optimizer, lr_scheduler)
        make_trainer(*callbacks, **options).fit(module, OuterSteps(seed), ckpt_path=ckpt_path)
        return module

    return learn


RANDOM = ForwardGradient(2)  # tells one outer step from another by its directions


def estimates(problem, meta, steps, numbers):
    """What the module is to find by ``RANDOM`` at those outer steps, with meta held fixed."""
    found = []
    for number in numbers:
        key = OuterSteps(0).key("step", number, torch.device("cpu"))
        batches = problem.batches(fold(key, "data"), steps)
        found.append(RANDOM.estimate(problem, meta, {}, batches, fold(key, "estimate")).grad["log_penalty"])
    return found


def test_matches_a_step_of_gradient_descent(learn):
    problem, _ = ridge()
    meta = problem.init_meta(None)
    (wanted,) = estimates(problem, meta, 5, [0])
    module = learn(estimator=RANDOM, max_steps=1)
    torch.testing.assert_close(module.meta["log_penalty"], meta["log_penalty"] - 0.5 * wanted)


def test_accumulation_and_clipping_are_the_trainers(learn):
    problem, _ = ridge()
    meta = problem.init_meta(None)
    parts = estimates(problem, meta, 5, [0, 1])
    wanted = torch.stack(parts).mean(0)
    assert not torch.allclose(*parts)
    module = learn(estimator=RANDOM, max_steps=1, accumulate_grad_batches=2, gradient_clip_val=float(wanted.norm()) / 4)
    moved = meta["log_penalty"] - module.meta["log_penalty"]
    torch.testing.assert_close(moved, 0.5 * wanted / 4, rtol=1e-4, atol=0)


def test_the_scheduler_steps_with_the_optimizer(learn):
    schedule = functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.5**step)
    module = learn(estimator=RANDOM, lr_scheduler=schedule, max_steps=2)
    problem, _ = ridge()
    meta = problem.init_meta(None)
    for number in range(2):
        (slope,) = estimates(problem, meta, 5, [number])
        meta = {"log_penalty": meta["log_penalty"] - 0.5 * 0.5**number * slope}
    torch.testing.assert_close(module.meta, meta)


@pytest.mark.parametrize("estimator", [Unrolled(), Unrolled("mixed", warm_start=True)], ids=["fresh", "warm"])
def test_resumed_run_is_bit_equal(learn, tmp_path, estimator):
    whole = learn(estimator=estimator, max_steps=6)
    options = {"estimator": estimator, "max_steps": 6, "enable_checkpointing": True}
    with pytest.raises(SystemExit):
        learn(RunCheckpoint(str(tmp_path), 2), Stop(3), **options)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    resumed = learn(RunCheckpoint(str(tmp_path), 2), ckpt_path=last, **options)
    torch.testing.assert_close(resumed.meta, whole.meta, rtol=0, atol=0)
    torch.testing.assert_close(resumed.estimator_state, whole.estimator_state, rtol=0, atol=0)


def test_checkpoint_of_another_run_is_refused(learn, tmp_path):
    keep = functools.partial(learn, RunCheckpoint(str(tmp_path), 2), enable_checkpointing=True)
    keep(max_steps=2)
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match="trained with seed 0, not 1; accepted: the same seed"):
        keep(max_steps=4, ckpt_path=last, seed=1)
    with pytest.raises(ValueError, match=r"the saved state has other parts: .*inner/params/w"):
        keep(max_steps=4, ckpt_path=last, estimator=Unrolled(warm_start=True))


def test_refused_pairs_are_named_before_training(learn):
    problem, _ = ridge()
    problem.terminal = False
    with pytest.raises(ValueError, match="Unrolled cannot be used on Ridge: mixed mode differentiates inner_loss only"):
        learn(estimator=Unrolled("mixed"), problem=problem)


def test_decreases_the_meta_objective(learn):
    problem, _ = ridge()
    start = problem.init_meta(None)
    module = learn(steps=40, max_steps=30)
    before, after = (
        float(problem.outer(m, problem.init(m, None)._replace(params={"w": problem.solution(m)}), problem.validation))
        for m in (start, module.meta)
    )
    assert after < before - 1e-4


def test_a_diverging_inner_run_is_told(learn):
    problem, _ = ridge(lr=1e3)
    with pytest.raises(ValueError, match=r"the meta-gradient of step 0 is (nan|inf): the inner run diverges"):
        learn(problem=problem, steps=200, max_steps=2, log_every_n_steps=1)


def test_sharded_parameters_are_refused(learn):
    module = MetaGradientLearning(ridge()[0], Unrolled(), 5, SGD)
    module.trainer = SimpleNamespace(strategy=FSDPStrategy(), _results=None)
    with pytest.raises(
        ValueError, match=r"trainer.strategy is FSDPStrategy, which shards parameters; accepted: auto, ddp"
    ):
        module.setup("fit")


def test_low_precision_is_refused_where_differences_would_drown(learn):
    with pytest.raises(
        ValueError, match=r"trainer.precision is bf16-mixed, in whose rounding the differences of ZerothOrder"
    ):
        learn(estimator=ZerothOrder(), precision="bf16-mixed")


def test_a_checkpoint_is_not_used_under_another_division_of_the_data(learn, tmp_path):
    keep = functools.partial(learn, RunCheckpoint(str(tmp_path), 2), enable_checkpointing=True)
    keep(problem=RandomRidge(first_order.SGD(0.1)), max_steps=2)
    with pytest.raises(ValueError, match=r"trained with data .*'seed': 0.*, not .*'seed': 1"):
        keep(
            problem=RandomRidge(first_order.SGD(0.1), seed=1),
            max_steps=4,
            ckpt_path=tmp_path / "checkpoints" / "last.ckpt",
        )
