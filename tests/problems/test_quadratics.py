"""Random quadratics against explicit loops and the closed form of gradient descent; in float64 where it is an oracle."""

from functools import partial

import pytest
import torch
from torch.func import vmap

from metalearn import tree
from metalearn.estimators.unrolled import Unrolled
from metalearn.optim.lstm import CoordinateLSTM
from metalearn.problems.quadratics import Quadratics
from metalearn.random import fold, key
from metalearn.unroll import Tasks


class Double(Quadratics):
    def init(self, meta, key):
        state = super().init(meta, key)
        return tree.map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, state)


def test_matches_autograd_through_an_explicit_loop_window_by_window():
    rule, horizon = CoordinateLSTM((5,), "none", 1.0), 6
    problem = Tasks(Double(rule, horizon, num_dims=4), num_tasks=3)
    meta = {name: value.double() for name, value in problem.init_meta(key(0)).items()}
    estimator = Unrolled("graph", warm_start=True)
    start = problem.init(meta, fold(key(2, 0), "episode"))
    W, y, x, rule_state = *start.extra.values(), start.params, start.rule
    state = estimator.init(problem, meta, key(1))
    state["done"] = torch.ones_like(state["done"])
    for window in range(2):
        found = estimator.estimate(problem, meta, state, problem.batches(key(0), 3), key(2, window))
        state, loss = found.state, torch.zeros(())
        leaves = {name: value.clone().requires_grad_() for name, value in meta.items()}
        x, rule_state = tree.detach((x, rule_state))
        for _ in range(3):
            residual = torch.einsum("tij,tj->ti", W, x["x"].detach()) - y
            grads = {"x": 2 * torch.einsum("tij,ti->tj", W, residual)}
            x, rule_state = vmap(partial(rule.update, leaves))(grads, rule_state, x)
            loss = loss + (torch.einsum("tij,tj->ti", W, x["x"]) - y).square().sum(1).mean() / horizon
        torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-12, atol=0)
        wanted = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        torch.testing.assert_close(found.grad, wanted, rtol=1e-9, atol=1e-12)
    assert bool(state["done"])


def test_matches_the_closed_form_of_gradient_descent_on_new_runs():
    """A linear rule without bias is gradient descent: x_T - x* = (I - 2 lr W^T W)^T (x_0 - x*)."""
    problem, lr = Quadratics(CoordinateLSTM((), "none", 1.0), horizon=40, num_dims=3, entries="normal"), 0.02
    meta = {"head/weight": torch.full((1, 1), -lr), "head/bias": torch.zeros(1)}
    found = problem.evaluate(meta, key(3), test=False)
    keys_R = fold(key(3), torch.arange(128))
    starts = tree.stack([problem.init(meta, fold(run, "init")) for run in keys_R])
    W, y, x = (leaf.double() for leaf in (starts.extra["W"], starts.extra["y"], starts.params["x"]))
    best = torch.linalg.solve(W, y)
    decay = torch.eye(3, dtype=torch.float64) - 2 * lr * W.mT @ W
    after = [
        (torch.linalg.matrix_power(decay, steps) @ (x - best).unsqueeze(-1)).squeeze(-1) + best for steps in (1, 40)
    ]
    first, last = ((torch.einsum("rij,rj->ri", W, x) - y).square().sum(1).mean() for x in after)
    assert found["final_loss"] == pytest.approx(float(last), rel=1e-4)
    assert found["log_final_loss"] == pytest.approx(float(last.log10()), abs=1e-4)
    assert last < found["mean_loss"] < first


@pytest.mark.parametrize(("entries", "mean", "std"), [("uniform", 0.5, 12**-0.5), ("normal", 0.0, 1.0)])
def test_every_task_is_drawn_anew(entries, mean, std):
    problem = Tasks(Quadratics(CoordinateLSTM((), "none"), entries=entries), 64)
    state = problem.init(problem.init_meta(key(0)), key(5))
    for drawn in state.extra.values():
        assert float(drawn.mean()) == pytest.approx(mean, abs=5 * std / drawn.numel() ** 0.5)
        assert float(drawn.std()) == pytest.approx(std, rel=0.1)
        assert len(drawn.flatten(1).unique(dim=0)) == 64
    assert float(state.params["x"].std()) == pytest.approx(0.01, rel=0.1)


def test_refuses_what_it_cannot_be():
    with pytest.raises(ValueError, match=r"num_dims is 0; accepted: 1 <= num_dims"):
        Quadratics(CoordinateLSTM(), num_dims=0)
    with pytest.raises(ValueError, match=r"entries is 'gaussian'; accepted: 'uniform', 'normal'"):
        Quadratics(CoordinateLSTM(), entries="gaussian")
    with pytest.raises(ValueError, match=r"horizon is 0; accepted: 1 <= horizon"):
        Quadratics(CoordinateLSTM(), horizon=0)
