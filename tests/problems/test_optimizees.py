"""Optimizees against training loops of torch; what parts, scales, lengths and objectives mean."""

import functools

import pytest
import torch
from problems.conftest import Clusters, opened
from problems.learned_rules import Scaled, keys
from torch import nn
from torch.func import vmap
from torch.nn import functional

from metalearn import random, tree
from metalearn.estimators.evolution import PersistentES
from metalearn.estimators.unrolled import Unrolled
from metalearn.models.vision import MLP
from metalearn.optim.factored_mlp import FactoredMLP
from metalearn.optim.hyper import NNAdam
from metalearn.optim.lstm import CoordinateLSTM
from metalearn.optim.small_mlp import SmallMLP
from metalearn.problems.baselines import curves
from metalearn.problems.optimizees import HELD_OUT, Optimizee
from metalearn.unroll import Tasks

MLP_4 = functools.partial(MLP, hidden=(4,))


class WithNorm(nn.Sequential):
    def __init__(self, num_inputs, num_outputs):
        super().__init__(nn.Linear(num_inputs, 4), nn.BatchNorm1d(4), nn.Linear(4, num_outputs))


class InHalf(MLP):
    def __init__(self, num_inputs, num_outputs):
        super().__init__(num_inputs, num_outputs, (4,))
        self.bfloat16()


def optimizee(**options):
    return opened(Optimizee(Clusters(), MLP_4, **({"rule": Scaled(), "horizon": 6, "batch_size": 5} | options)))


def by_torch(problem, key, steps, part):
    """Gradient descent by autograd, the batches those of the keys ``fold(key, "step", k)``."""
    module = MLP_4(6, 3)
    module.load_state_dict(problem.initial(random.fold(key, "init"))[0])
    found, own = [], dict(module.named_parameters())
    for k in range(steps):
        x, y = problem._drawn(part, random.fold(key, "step", k))
        outputs = torch.func.functional_call(module, own, (x,))
        loss = functional.cross_entropy(outputs, y)
        grads = torch.autograd.grad(loss, list(own.values()))
        rate = torch.tensor(-2.0).exp()
        own = {n: (p - rate * g).detach().requires_grad_() for (n, p), g in zip(own.items(), grads, strict=True)}
        found.append(float(loss.detach()))
    return torch.tensor(found)


@pytest.mark.parametrize("part", ["train", "validation"])
def test_matches_torch_training(part):
    problem = optimizee()
    found = curves(problem.on(part), problem.rule, problem.init_meta(random.key(0)), keys(3), 6)
    wanted = torch.stack([by_torch(problem, key, 6, part) for key in keys(3)])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert problem.part == "train"


def test_rescaling_leaves_the_function_at_the_start_and_multiplies_gradients():
    plain, scaled = optimizee(), optimizee(rescale=10.0)
    key, meta = random.key(3), {"log_rate": torch.tensor(-2.0)}
    first, second = plain.init(meta, key), scaled.init(meta, key)
    x = plain.parts["train"].inputs
    torch.testing.assert_close(scaled.predict(second, x), plain.predict(first, x), rtol=1e-4, atol=1e-5)
    scales = torch.stack([value for name, value in second.extra.items() if name.startswith("scale/")])
    assert scales.min() >= 0.1 and scales.max() <= 10 and len(scales.unique()) == 4
    (after, _), (after_scaled, _) = (p.step(meta, s, None, key) for p, s in ((plain, first), (scaled, second)))
    for name, value in first.params.items():
        s = second.extra[f"scale/{name}"]  # u = w / s: du = s dw, and the parameter w = u s moves s^2 as far
        moved = (after_scaled.params[name] - second.params[name]) * s
        torch.testing.assert_close(moved, (after.params[name] - value) * s**2, rtol=1e-3, atol=1e-5)


def test_lengths_of_episodes_are_log_uniform_and_whole_windows():
    problem = optimizee(horizon=640, shortest=10, multiple_of=10)
    lengths = torch.stack([problem._horizon(key) for key in keys(400)])
    assert lengths.min() == 10 and lengths.max() == 640 and not (lengths % 10).any()
    between = optimizee(horizon=60, shortest=14, multiple_of=10)
    assert {int(between._horizon(key)) for key in keys(100)} == {20, 30, 40, 50, 60}
    assert 60 < lengths.float().log().mean().exp() < 105  # the geometric mean of 10 ... 640 is 80
    state = problem.init({"log_rate": torch.tensor(-2.0)}, random.key(0))
    state = state._replace(extra=state.extra | {"horizon": torch.tensor(2)})
    meta, done = {"log_rate": torch.tensor(-2.0)}, []
    for _ in range(3):
        state, output = problem.step(meta, state, None, random.key(1))
        done.append(bool(output.done))
    assert done == [False, True, True]


@pytest.mark.parametrize(
    "rule", [SmallMLP(), FactoredMLP(), NNAdam(), CoordinateLSTM()], ids=lambda rule: type(rule).__name__
)
@pytest.mark.parametrize("options", [{}, {"objective": "validation", "inner_validation": 0.4}, {"rescale": 3.0}])
@torch.no_grad()
def test_steps_of_many_runs_are_those_of_each(rule, options):
    assert_same_steps(opened(Optimizee(Clusters(), MLP_4, rule, horizon=6, batch_size=5, **options)))


@pytest.mark.parametrize("model", [WithNorm, InHalf], ids=lambda model: model.__name__)
@torch.no_grad()
def test_steps_of_many_runs_know_statistics_and_half_precision(model):
    assert_same_steps(opened(Optimizee(Clusters(), model, SmallMLP(), horizon=6, batch_size=5)))


def assert_same_steps(problem):
    several = keys(3)
    weights = [problem.init_meta(key) for key in several]
    metas = tree.map(lambda leaf: leaf + 0.1, tree.stack(weights))
    states = tree.stack([problem.init(tree.index(metas, run), key) for run, key in enumerate(several)])
    alone = together = states
    for number in range(3):
        drawn = random.fold(torch.stack(list(several)), number)
        alone, wanted = vmap(problem.step, (0, 0, None, 0))(metas, alone, None, drawn)
        together, found = problem.step_runs(metas, together, None, drawn)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_steps_of_many_runs_are_differentiated_where_gradients_are_on():
    problem = optimizee()
    metas = {"log_rate": torch.tensor([-2.0, -1.0], requires_grad=True)}
    states = tree.stack([problem.init({"log_rate": torch.tensor(-2.0)}, key) for key in keys(2)])
    drawn = torch.stack(list(keys(2)))
    states, _ = problem.step_runs(metas, states, None, drawn)
    _, output = problem.step_runs(metas, states, None, drawn + 1)
    (grad,) = torch.autograd.grad(output.loss.sum(), metas["log_rate"])
    assert grad.all()


def test_runs_may_be_stepped_in_inference_mode():
    problem, meta = optimizee(rule=SmallMLP()), SmallMLP().init_meta(random.key(0))
    expected = curves(problem, problem.rule, meta, keys(2), 4)
    with torch.inference_mode():
        torch.testing.assert_close(curves(problem, problem.rule, meta, keys(2), 4), expected)


def test_losses_are_in_float32_under_autocast():
    problem = optimizee()
    meta, key = {"log_rate": torch.tensor(-2.0)}, random.key(4)
    state = problem.init(meta, key)
    _, plain = problem.step(meta, state, None, key)
    with torch.autocast("cpu", torch.bfloat16):
        _, output = problem.step(meta, state, None, key)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, plain.loss, rtol=2e-2, atol=1e-3)


def test_tasks_of_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="Optimizee draws the length of each episode anew; accepted by Tasks"):
        Tasks(optimizee(shortest=2), 3)


def test_the_validation_objective_is_of_examples_that_no_run_is_trained_on():
    problem = optimizee(objective="validation", inner_validation=0.4)
    whole = Clusters().read("train")
    train, held = problem.parts["train"], problem.parts["train" + HELD_OUT]
    assert len(held.targets) == round(0.4 * len(whole.targets)) and len(train.targets) + len(held.targets) == len(
        whole.targets
    )
    assert not (train.inputs[:, None] == held.inputs[None]).all(-1).any()
    meta, key = {"log_rate": torch.tensor(-2.0)}, random.key(4)
    state, output = problem.step(meta, problem.init(meta, key), None, key)
    x, y = problem._drawn("train" + HELD_OUT, key)
    torch.testing.assert_close(output.loss, functional.cross_entropy(problem.predict(state, x), y) / 6)


def test_inputs_as_targets_train_an_autoencoder():
    problem = optimizee(target="input", horizon=60)
    assert problem.num_outputs == 6
    found = curves(problem, problem.rule, {"log_rate": torch.tensor(-1.0)}, keys(4), 60)
    assert found[:, -10:].mean() < 0.9 * found[:, :10].mean()
    scored = problem.evaluate({"log_rate": torch.tensor(-1.0)}, random.key(1), test=False)
    assert scored.keys() == {"loss"} and scored["loss"] == pytest.approx(float(found[:, -10:].mean()), rel=0.4)


@pytest.mark.parametrize("estimator", [PersistentES(pairs=64, std=0.05), Unrolled("graph")], ids=["pes", "unrolled"])
def test_meta_gradient_matches_finite_differences(estimator):
    """Of the learning rate, over one whole episode that all estimators are given; evolution within its noise."""
    problem = optimizee(horizon=6, batch_size=24, init_seed=1, second_derivatives=True)
    key, meta = random.key(2), problem.init_meta(random.key(0))
    state = estimator.init(problem, meta, key)
    found = estimator.estimate(problem, meta, state, problem.batches(key, 6), key)

    def objective(log_rate):
        run = curves(problem, problem.rule, {"log_rate": torch.tensor(log_rate)}, keys(48, seed=5), 6)
        return float(run.mean())

    wanted = (objective(-1.9) - objective(-2.1)) / 0.2
    assert wanted < 0
    assert abs(float(found.grad["log_rate"]) / wanted - 1) < 0.25


def test_second_derivatives_are_left_out_unless_asked_for():
    found = {}
    for second in (False, True):
        problem = optimizee(init_seed=1, second_derivatives=second)
        meta, key = problem.init_meta(random.key(0)), random.key(2)
        estimator = Unrolled("graph")
        found[second] = estimator.estimate(
            problem, meta, estimator.init(problem, meta, key), problem.batches(key, 6), key
        ).grad
    assert found[False]["log_rate"] != found[True]["log_rate"]
    assert tree.dot(found[False], found[True]) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "test"}, "objective is 'test'; accepted: 'train', 'validation'"),
        ({"objective": "validation"}, "inner_validation is 0.0 with objective validation; accepted: 0 < share < 1"),
        ({"inner_validation": 0.1}, "inner_validation is 0.1 with objective train; accepted: 0"),
        ({"shortest": 7}, "shortest is 7; accepted: 1 <= shortest <= 6"),
        ({"nominal_horizon": 7}, "nominal_horizon is 7; accepted: 1 <= nominal_horizon <= 6"),
        ({"multiple_of": 4}, "multiple_of is 4 with horizon 6; accepted: what divides the horizon"),
        ({"multiple_of": 3, "shortest": 2}, "multiple_of is 3; accepted: 1 <= multiple_of <= 2"),
        ({"rescale": 0.5}, "rescale is 0.5; accepted: 1.0 <= rescale"),
        ({"target": "x"}, "target is 'x'"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_refuses_what_is_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        optimizee(**options)
