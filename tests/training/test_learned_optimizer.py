"""Meta-training of optimizers: what is written for the user, what evaluations say, runs that stop and go on."""

import functools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from problems.conftest import Clusters
from problems.learned_rules import Scaled
from training.conftest import Stop

from metalearn import random, tree
from metalearn.estimators.evolution import GeneralizedPersistentES, NoiseReuseES, PersistentES, TruncatedES
from metalearn.estimators.forward import ForwardGradient, TwoPhase
from metalearn.estimators.unrolled import Unrolled
from metalearn.models.vision import MLP
from metalearn.optim.first_order import Adam
from metalearn.optim.learnable import LearnableSGD
from metalearn.optim.saving import load_rule
from metalearn.problems.mixture import Mixture
from metalearn.problems.optimizees import Optimizee
from metalearn.problems.quadratics import Quadratics
from metalearn.training.callbacks import RunCheckpoint
from metalearn.training.learned_optimizer import RULE, LearnedOptimizerTraining
from metalearn.training.meta_gradient import OuterSteps
from metalearn.unroll import Tasks

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


def optimizee(width=4, rule=None, **options):
    model = functools.partial(MLP, hidden=(width,))
    return Optimizee(Clusters(), model, rule or LearnableSGD(), **({"horizon": 6, "batch_size": 8} | options))


@pytest.fixture
def learn(make_trainer):
    """Meta-train on clusters: ``learn(callbacks…, problem=…, estimator=…, max_steps=…)`` returns the module."""

    def learn(*callbacks, problem=None, estimator=None, steps=3, lr=0.05, ckpt_path=None, **options):
        build = functools.partial(torch.optim.Adam, lr=lr)
        estimator = estimator or NoiseReuseES(pairs=4, stagger=True)
        module = LearnedOptimizerTraining(problem or optimizee(), estimator, steps, build, runs=3)
        make_trainer(*callbacks, **options).fit(module, OuterSteps(0), ckpt_path=ckpt_path)
        return module

    return learn


def mixture():
    rule = LearnableSGD()
    return Mixture([optimizee(3, rule), optimizee(5, rule, shortest=3, multiple_of=3)])


RESUMED = {
    "nres": (NoiseReuseES(pairs=2, stagger=True), optimizee),
    "nres, mixture": (NoiseReuseES(pairs=2, stagger=True), mixture),
    "pes": (PersistentES(pairs=2), optimizee),
    "gpes": (GeneralizedPersistentES(pairs=2, resample_every=2), optimizee),
    "es": (TruncatedES(pairs=2), optimizee),
    "truncated": (Unrolled("graph", warm_start=True), optimizee),
    "truncated, mixture": (Unrolled("graph", warm_start=True), mixture),
    "fg2u": (ForwardGradient(directions=2), optimizee),
}


@pytest.mark.parametrize(("estimator", "problem"), RESUMED.values(), ids=RESUMED.keys())
def test_resumed_run_is_bit_equal(learn, tmp_path, estimator, problem):
    """Weights, inner runs and the file that is taken home."""
    options = {"estimator": estimator, "max_steps": 6, "enable_checkpointing": True}
    whole = learn(RunCheckpoint(str(tmp_path / "whole"), 2), problem=problem(), **options)
    wanted = load_rule(tmp_path / RULE).weights
    (tmp_path / RULE).unlink()
    with pytest.raises(SystemExit):
        learn(RunCheckpoint(str(tmp_path), 2), Stop(3), problem=problem(), **options)
    assert (tmp_path / RULE).is_file()
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    resumed = learn(RunCheckpoint(str(tmp_path), 2), problem=problem(), ckpt_path=last, **options)
    torch.testing.assert_close(resumed.meta, whole.meta, rtol=0, atol=0)
    torch.testing.assert_close(resumed.estimator_state, whole.estimator_state, rtol=0, atol=0)
    torch.testing.assert_close(load_rule(tmp_path / RULE).weights, wanted, rtol=0, atol=0)
    torch.testing.assert_close(wanted, whole.meta, rtol=0, atol=0)


def test_meta_training_finds_a_better_learning_rate(learn):
    """From a rate a hundred times too small, by evolution, in a rule whose only weight is the rate."""
    problem = optimizee(rule=Scaled(log_rate=-5.0), horizon=12)
    module = learn(problem=problem, estimator=NoiseReuseES(pairs=8, std=0.1, stagger=True), lr=0.2, max_steps=30)
    assert module.meta["log_rate"] > -3.0


def test_evaluations_are_on_new_runs_and_the_stages_own_examples(make_trainer, tmp_path):
    problem = optimizee(nominal_horizon=4)
    module = LearnedOptimizerTraining(
        problem, NoiseReuseES(pairs=2), 3, functools.partial(torch.optim.Adam, lr=0.1), runs=3, horizons=(1, 2)
    )
    make_trainer(limit_val_batches=1).validate(module, OuterSteps(0))
    assert "test" not in problem.parts and problem.source.opened.count("test") == 0
    numbers = json.loads((tmp_path / "validation.json").read_text())
    assert numbers["1x/ratio"] == numbers["1x/learned/mean_loss"] / numbers["1x/Adam/mean_loss"]
    assert {name.split("/")[0] for name in numbers} == {"1x", "2x"}
    header, *rows = (tmp_path / "validation_curves.csv").read_text().splitlines()
    assert header == "problem,horizon,optimizer,lr,step,loss,standard_error"
    assert len(rows) == 4 * (4 + 8)  # the rule and three rivals, once and twice the nominal horizon
    keys = {purpose: set(module._keys(purpose).tolist()) for purpose in ("tuning", "validation", "test", "progress")}
    assert all(len(own) == 3 for own in keys.values()) and len(set.union(*keys.values())) == 12


def test_several_quadratics_at_a_time_are_trained_and_judged(learn, make_trainer, tmp_path):
    problem = Tasks(Quadratics(Scaled(log_rate=-5.0), horizon=6, num_dims=3), 16)
    module = learn(
        RunCheckpoint(str(tmp_path), 20),
        problem=problem,
        estimator=Unrolled("graph", warm_start=True),
        lr=0.2,
        max_steps=20,
        enable_checkpointing=True,
    )
    assert module.meta["log_rate"] > -4.0
    make_trainer(limit_val_batches=1).validate(module, OuterSteps(0))
    numbers = json.loads((tmp_path / "validation.json").read_text())
    assert 0 < numbers["1x/learned/final_loss"] < numbers["1x/learned/mean_loss"] < math.inf
    assert load_rule(tmp_path / RULE, [Scaled]).weights["log_rate"] == module.meta["log_rate"]


def unequal_quadratics(tasks):
    problems = [Quadratics(LearnableSGD(), horizon=6, num_dims=dims) for dims in (2, 3)]
    return Mixture([Tasks(each, 4) for each in problems] if tasks else problems)


@pytest.mark.parametrize(
    ("problem", "estimator"),
    [
        (unequal_quadratics(tasks=True), Unrolled(warm_start=True)),
        (unequal_quadratics(tasks=False), NoiseReuseES(4)),
        (unequal_quadratics(tasks=False), TwoPhase(NoiseReuseES(4), PersistentES(4), switch=2)),
        (Tasks(Quadratics(LearnableSGD(), horizon=6, num_dims=2), 4), Unrolled(warm_start=True)),
    ],
    ids=["tasks of a mixture", "pairs of a mixture", "phases of a mixture", "tasks"],
)
def test_checkpoints_hold_what_every_rank_has_of_tasks_and_pairs(problem, estimator):
    module = LearnedOptimizerTraining(problem, estimator, 2, functools.partial(torch.optim.Adam, lr=0.1))
    divided = problem if module.estimator.shards == "outer" else module.estimator

    def state(rank, world):
        divided.rank, divided.world = rank, world
        return tree.pack(module.estimator.init(problem, problem.init_meta(random.key(0)), random.key(1)))

    alone, ranks = state(0, 1), [state(rank, 2) for rank in (0, 1)]
    for rank, own in enumerate(ranks):
        module._trainer = SimpleNamespace(global_rank=rank, world_size=2)
        torch.testing.assert_close(module._own_share(alone), own, rtol=0, atol=0)
    module._trainer = SimpleNamespace(world_size=2)
    for name, leaf in ranks[0].items():
        module.all_gather = lambda leaf, name=name: torch.stack([own[name] for own in ranks])
        torch.testing.assert_close(module._all_shares({name: leaf})[name], alone[name], rtol=0, atol=0)


def test_what_cannot_be_meta_trained_is_refused(learn, tmp_path):
    make = functools.partial(torch.optim.Adam, lr=0.1)
    with pytest.raises(ValueError, match="rule is Adam; accepted: a LearnedRule"):
        LearnedOptimizerTraining(optimizee(rule=Adam()), NoiseReuseES(), 3, make)
    with pytest.raises(ValueError, match="horizons is 0; accepted: 1 <="):
        LearnedOptimizerTraining(optimizee(), NoiseReuseES(), 3, make, horizons=(0,))
    unlike = Mixture([optimizee(), optimizee(rule=LearnableSGD(lr=0.5))])
    with pytest.raises(
        ValueError, match=r"problems of a mixture have the rules .*0.01.* and .*0.5.*; accepted: one rule"
    ):
        LearnedOptimizerTraining(unlike, NoiseReuseES(), 3, make)


def test_a_checkpoint_of_another_rule_or_estimator_is_refused(learn, tmp_path, make_trainer):
    keep = functools.partial(learn, RunCheckpoint(str(tmp_path), 2), enable_checkpointing=True)
    keep(problem=mixture(), max_steps=2)
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match=r"trained with estimator NoiseReuseES, not PersistentES"):
        keep(problem=mixture(), estimator=PersistentES(pairs=4), max_steps=4, ckpt_path=last)
    rule = Scaled()
    other = Mixture([optimizee(3, rule), optimizee(5, rule)])
    with pytest.raises(ValueError, match=r"trained with rule .*LearnableSGD.*, not .*Scaled"):
        keep(problem=other, max_steps=4, ckpt_path=last)
    module = LearnedOptimizerTraining(other, NoiseReuseES(pairs=4), 3, functools.partial(torch.optim.Adam, lr=0.1))
    with pytest.raises(ValueError, match=r"trained with rule .*LearnableSGD.*, not .*Scaled"):
        make_trainer(limit_val_batches=1).validate(module, OuterSteps(0), ckpt_path=last)
