import pytest
import torch
from problems.conftest import Clusters, assert_matches_central_differences, double, estimate, opened

from metalearn import random, tree
from metalearn.estimators.unrolled import Unrolled
from metalearn.optim.first_order import SGD, Adam
from metalearn.problems.schedules import LearningRateSchedule


def schedule(source=None, rule=None, **options):
    options = dict(horizon=8, lr=0.3, decay=1.5, time_scale=4.0, batch_size=10) | options
    return LearningRateSchedule(source or Clusters(), double, rule or SGD(1.0, momentum=0.9), **options)


@pytest.mark.parametrize("rule", [SGD(1.0, momentum=0.9), Adam(1.0)])
def test_matches_central_differences(rule):
    problem = opened(schedule(rule=rule, lr=0.1))
    assert_matches_central_differences(problem, problem.init_meta(random.key(0)), 8)


def test_the_rate_falls_by_inverse_time():
    problem = opened(schedule())
    meta = problem.init_meta(random.key(0))
    found = torch.stack([problem.rate(meta, torch.tensor(t)) for t in range(6)])
    wanted = torch.tensor([0.3 / (1 + t / 4) ** 1.5 for t in range(6)], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_matches_descent_written_out():
    """Every step moves by the scheduled rate, and the objective is the mean of the losses before the updates."""
    problem = opened(schedule(rule=SGD(1.0)))
    key, meta = random.key(0), problem.init_meta(random.key(0))
    state, losses = problem.init(meta, key), []
    for t in range(8):
        before, state_key = state, random.fold(key, t)
        state, output = problem.step(meta, before, None, state_key)
        batch = problem._with_repetition("train", 10, random.fold(state_key, "train"))
        leaves = {n: v.clone().requires_grad_() for n, v in before.params.items()}
        loss, _ = problem.inner_loss(meta, before._replace(params=leaves), batch, key)
        loss.backward()
        losses.append(loss.detach() / 8)
        torch.testing.assert_close(output.loss, losses[-1], rtol=1e-12, atol=0)
        for name, leaf in leaves.items():
            moved = before.params[name] - 0.3 / (1 + t / 4) ** 1.5 * leaf.grad
            torch.testing.assert_close(state.params[name], moved, rtol=1e-6, atol=1e-9)
        assert bool(output.done) == (t == 7)


def test_steps_of_runs_at_different_ages_are_each_their_own():
    problem = opened(schedule(objective="accuracy", outer_batch_size=16))
    keys = random.fold(random.key(1), torch.arange(3))
    metas = tree.stack([{n: v + i for n, v in problem.init_meta(keys[0]).items()} for i in range(3)])
    states = tree.stack([problem.init(tree.index(metas, i), keys[i]) for i in range(3)])
    states = states._replace(step=torch.tensor([0, 3, 7]))
    together = torch.vmap(lambda m, s, k: problem.step(m, s, None, k))(metas, states, keys)
    for i in range(3):
        alone = problem.step(tree.index(metas, i), tree.index(states, i), None, keys[i])
        torch.testing.assert_close(tree.index(together, i), alone, rtol=1e-10, atol=1e-12)
    assert together[1].done.tolist() == [False, False, True]


def test_accuracy_is_the_validation_error_and_refuses_gradients():
    problem = opened(schedule(objective="accuracy"))
    key, meta = random.key(0), problem.init_meta(random.key(0))
    state, output = problem.step(meta, problem.init(meta, key), None, key)
    assert float(output.loss) * 8 == pytest.approx(1 - problem.score(state, "validation")["accuracy"])
    with pytest.raises(ValueError, match="cannot be differentiated"):
        Unrolled("store").init(problem, meta, key)


def test_descending_the_meta_gradient_improves_the_run():
    problem = opened(schedule(Clusters(num_examples=100, spread=1.5), horizon=20, lr=0.01, decay=0.1, init_seed=0))
    meta = problem.init_meta(random.key(0))
    first = problem.evaluate(meta, random.key(9), test=False)
    for step in range(10):
        meta = tree.add(meta, estimate(problem, meta, 20, seed=step).grad, -3.0)
    last = problem.evaluate(meta, random.key(9), test=False)
    assert last["objective"] < 0.8 * first["objective"]
    assert last["accuracy"] > first["accuracy"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(lr=0.0), "lr is 0.0"),
        (dict(decay=-1.0), "decay is -1.0"),
        (dict(time_scale=0.0), "time_scale is 0.0"),
        (dict(objective="f1"), "objective is 'f1'"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(horizon=0), "horizon is 0"),
    ],
)
def test_refuses(options, named):
    with pytest.raises(ValueError, match=named):
        opened(schedule(**options))
