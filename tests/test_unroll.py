"""The inner loop: against torch's own loop, bit-equal when run again, batched over tasks."""

import copy
import threading

import pytest
import torch
from estimators.conftest import estimate, relative, ridge
from torch import nn
from torch.nn import functional

from metalearn import tree
from metalearn.base import Batches
from metalearn.estimators.unrolled import Unrolled
from metalearn.optim.first_order import SGD, Adam
from metalearn.random import fold, key, normal
from metalearn.unroll import Descent, TaskBatch, Tasks, differentiable_kernels, unroll


class Regression(Descent):
    """A small network on a few random rows, with dropout and batch statistics; meta scales the targets."""

    def __init__(self, rule, dropout=0.5, horizon=None):
        super().__init__(rule, horizon)
        self.module = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1)
        ).double()
        self.steady = copy.deepcopy(self.module)
        self.steady[3].eval()
        self.global_generator = dropout > 0

    def init_meta(self, key):
        return {"scale": torch.tensor(1.5, dtype=torch.float64)}

    def init(self, meta, key):
        return self.start(meta, *tree.initialise(self.module, key))

    def inner_loss(self, meta, state, batch, key):
        output, buffers = tree.call(self.module, state.params, state.buffers, batch[0])
        return (output.squeeze(-1) - meta["scale"] * batch[1]).square().mean(), buffers

    def outer(self, meta, state, batch):
        output, _ = tree.call(self.steady, state.params, state.buffers, batch[0])
        return functional.mse_loss(output.squeeze(-1), batch[1])

    def batches(self, key, steps):
        x = normal(fold(key, "x"), (16, 3)).double()
        return Batches(lambda k: (x[k % 2 :: 2], x[k % 2 :: 2, 0]), (x, x[:, 0]), steps)


def test_matches_a_torch_loop():
    problem = Regression(Adam(0.01), dropout=0.0)
    meta, batches = problem.init_meta(key(0)), problem.batches(key(0), 7)
    end = unroll(problem, meta, problem.init(meta, key(1)), batches, key(2)).end
    module = problem.module
    params, buffers = tree.initialise(module, key(1))
    module.load_state_dict(params | buffers)
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for k in range(7):
        x, y = batches.inner(k)
        optimizer.zero_grad()
        functional.mse_loss(module(x).squeeze(-1), 1.5 * y).backward()
        optimizer.step()
    torch.testing.assert_close(end.params, dict(module.named_parameters()), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(end.buffers, dict(module.named_buffers()), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("mode", ["store", "checkpoint", "mixed"])
def test_recomputation_with_dropout_is_that_of_one_graph(mode):
    problem = Regression(SGD(0.1, momentum=0.9))
    meta = problem.init_meta(key(0))
    whole, found = (estimate(Unrolled(m), problem, meta, steps=6) for m in ("graph", mode))
    assert relative(found.grad, whole.grad) <= 1e-10
    assert torch.equal(whole.loss, found.loss)


def test_dropout_leaves_the_global_generator_alone():
    problem = Regression(SGD(0.1))
    meta, before = problem.init_meta(key(0)), torch.random.get_rng_state()
    batches = problem.batches(key(0), 3)
    first, again = (unroll(problem, meta, problem.init(meta, key(1)), batches, key(2)).end for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("mode", ["graph", "store", "mixed"])
def test_tasks_match_their_mean_one_by_one(mode):
    problem = Regression(SGD(0.1, momentum=0.9), dropout=0.0)
    tasks, meta = Tasks(problem, 3), problem.init_meta(key(0))
    joint = estimate(Unrolled(mode), tasks, meta, steps=4)
    estimator, k = Unrolled("graph"), key(0)
    singles = []
    for t in range(3):
        start = problem.init(meta, fold(fold(k, "episode"), t))
        batches = problem.batches(fold(k, torch.tensor(t)), 4)
        with torch.enable_grad():
            leaf = {"scale": meta["scale"].clone().requires_grad_()}
            end = unroll(problem, leaf, start, batches, k).end
            singles.append(torch.autograd.grad(problem.outer(leaf, end, batches.outer), leaf["scale"])[0])
    torch.testing.assert_close(joint.grad["scale"], torch.stack(singles).mean(), rtol=1e-10, atol=0)
    assert estimator.refusal(tasks) is None


def test_each_of_several_runs_gives_its_rule_its_own_loss():
    class Scaled(SGD):
        needs_loss = True

        def update(self, meta, grads, state, params, *, loss=None):
            return super().update(meta, {name: loss * grad for name, grad in grads.items()}, state, params)

    rule, p, loss = TaskBatch(Scaled(0.1)), {"p": torch.ones(3, 2)}, torch.tensor([1.0, 2.0, 4.0])
    after, _ = rule.update({}, p, rule.init({}, p), p, loss=loss)
    torch.testing.assert_close(after["p"], 1 - 0.1 * loss[:, None].expand(3, 2))
    with pytest.raises(ValueError, match="Scaled needs the loss of each of several runs"):
        rule.update({}, p, rule.init({}, p), p, loss=loss.mean())


def test_ranks_divide_the_tasks():
    problem = Regression(SGD(0.1), dropout=0.0)
    meta, found = problem.init_meta(key(0)), []
    for rank in range(2):
        tasks = Tasks(problem, 4)
        tasks.rank, tasks.world = rank, 2
        found.append(estimate(Unrolled(), tasks, meta, steps=2).grad["scale"])
    whole = estimate(Unrolled(), Tasks(problem, 4), meta, steps=2).grad["scale"]
    torch.testing.assert_close(torch.stack(found).mean(), whole, rtol=1e-12, atol=0)
    tasks = Tasks(problem, 3)
    tasks.rank, tasks.world = 0, 2
    with pytest.raises(ValueError, match="num_tasks is 3; accepted: a multiple of the 2 ranks"):
        tasks.init(meta, key(0))


def test_a_window_must_not_straddle_episodes():
    problem, meta = ridge(horizon=4)
    with pytest.raises(ValueError, match="steps is 5, but the episode of 4 steps has 4 left"):
        estimate(Unrolled(), problem, meta, steps=5)


def test_truncation_is_backpropagation_from_the_state_before():
    problem, meta = ridge()
    batches = problem.batches(key(0), 12)
    before = unroll(problem, meta, problem.init(meta, key(0)), batches._replace(steps=9), key(0)).end
    leaf = {"log_penalty": meta["log_penalty"].clone().requires_grad_()}
    with torch.enable_grad():
        end = unroll(problem, leaf, before, batches._replace(steps=3), key(0)).end
        wanted = torch.autograd.grad(problem.outer(leaf, end, batches.outer), leaf["log_penalty"])[0]
    for mode in ("graph", "store", "checkpoint", "mixed"):
        found = estimate(Unrolled(mode, truncate=3), problem, meta, steps=12)
        torch.testing.assert_close(found.grad["log_penalty"], wanted, rtol=1e-12, atol=1e-15)


def test_a_warm_started_run_goes_on_and_begins_anew_when_its_episode_ends():
    problem, meta = ridge(horizon=4)
    estimator, batches = Unrolled(warm_start=True), problem.batches(key(0), 2)
    state = estimator.init(problem, meta, key(0))
    steps = []
    for number in range(4):
        found = estimator.estimate(problem, meta, state, batches, key(number))
        state = found.state
        steps.append((int(state["inner"].step), bool(state["done"]), bool(found.grad["log_penalty"].any())))
    assert steps == [(2, False, False), (4, True, True), (2, False, False), (4, True, True)]


class Undeclared(Regression):
    def __init__(self):
        super().__init__(SGD(0.1))
        self.global_generator = False


def test_undeclared_draws_are_refused():
    problem = Undeclared()
    with pytest.raises(ValueError, match="a step of Undeclared draws from torch's global generator"):
        estimate(Unrolled(), problem, problem.init_meta(key(0)), steps=2)


class Tracked(Regression):
    """Every step's loss counts, and the objective is not terminal."""

    terminal = False

    def step(self, meta, state, batch, key):
        state, output = super().step(meta, state, batch, key)
        return state, output._replace(loss=self.inner_loss(meta, state, batch, key)[0])


@pytest.mark.parametrize("truncate", [None, 2])
def test_losses_of_steps_count_from_the_first_differentiated_one(truncate):
    problem = Tracked(SGD(0.1, momentum=0.9), dropout=0.0)
    meta = problem.init_meta(key(0))
    whole, stored, kept = (
        estimate(Unrolled(mode, truncate), problem, meta, steps=5).grad for mode in ("graph", "store", "checkpoint")
    )
    assert max(relative(stored, whole), relative(kept, whole)) <= 1e-12
    assert relative(estimate(Unrolled("graph", 5), problem, meta, steps=5).grad, whole) > (0.1 if truncate else -1)


def test_threads_leave_the_attention_kernels_as_they_were():
    before = torch.backends.cuda.flash_sdp_enabled()
    gate, held = threading.Barrier(2), []

    def hold(first):
        with differentiable_kernels():
            gate.wait()
            held.append(torch.backends.cuda.flash_sdp_enabled())
            if first:
                gate.wait()
        if not first:
            gate.wait()

    threads = [threading.Thread(target=hold, args=(first,)) for first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held == [False, False] and torch.backends.cuda.flash_sdp_enabled() == before
