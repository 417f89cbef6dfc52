"""The coordinate-wise LSTM against torch's cell, numpy and the trace of the released code."""

import numpy as np
import pytest
import torch
from torch.func import vmap

from metalearn import tree
from metalearn.estimators.unrolled import Unrolled
from metalearn.optim.layout import Layout
from metalearn.optim.lstm import CoordinateLSTM, log_and_sign
from metalearn.random import key
from metalearn.unroll import Descent, StepOutput, ended, inner_gradient, update


class Square(Descent):
    """x^2 from x = 1, by a rule that is given gradients as constants."""

    terminal = False

    def init_meta(self, key):
        return tree.zeros_like(CoordinateLSTM((), "none").weights)

    def rule_meta(self, meta):
        return meta

    def init(self, meta, key):
        return self.start(meta, {"x": torch.ones(())}, {})

    def inner_loss(self, meta, state, batch, key):
        return state.params["x"].square(), {}

    def step(self, meta, state, batch, key):
        grads, loss, _ = inner_gradient(self, meta, state, batch, key)
        state = update(self, meta, state, tree.detach(grads), loss, {})
        return state, StepOutput(state.params["x"].square(), ended(self, state))


def test_matches_the_trace_of_the_released_code():
    """Without layers and from weights of zero: two windows of five steps, Adam at 0.01 after each."""
    problem = Square(CoordinateLSTM((), "none", 1.0), horizon=10)
    estimator, meta = Unrolled("graph", warm_start=True), problem.init_meta(key(0))
    optimizer = torch.optim.Adam(list(meta.values()), lr=0.01)
    state = estimator.init(problem, meta, key(0))
    for window in range(2):
        found = estimator.estimate(problem, meta, state, problem.batches(key(0), 5), key(0, window))
        state = found.state
        for name, value in meta.items():
            value.grad = found.grad[name]
        optimizer.step()
    x = state["inner"].params["x"]
    torch.testing.assert_close(torch.stack([x.square(), x]), torch.tensor([0.73253274, 0.85588127]), rtol=0, atol=2e-7)


@pytest.mark.parametrize(("preprocessing", "num_inputs", "num_weights"), [("none", 1, 5061), ("released", 2, 5141)])
def test_matches_torchs_cells_with_summed_biases(preprocessing, num_inputs, num_weights):
    rule = CoordinateLSTM((20, 20), preprocessing, 0.1)
    meta = {name: value.double() for name, value in rule.init_meta(key(1)).items()}
    assert sum(value.numel() for value in meta.values()) == num_weights
    cells = [torch.nn.LSTMCell(size, 20, dtype=torch.float64) for size in (num_inputs, 20)]
    for layer, cell in enumerate(cells):
        i, f, o, j = meta[f"{layer}/weight"].T.chunk(4)
        cell.weight_ih.data, cell.weight_hh.data = torch.cat([i, f, j, o]).tensor_split([cell.input_size], 1)
        i, f, o, j = meta[f"{layer}/bias"].chunk(4)
        cell.bias_ih.data = torch.cat([i, f, j, o]) - cell.bias_hh.data
    params = {"a": torch.randn(3, 2, dtype=torch.float64), "b": torch.randn((), dtype=torch.float64)}
    flat, state, own = torch.cat([params["a"].flatten(), params["b"][None]]), rule.init(meta, params), {}
    for _ in range(4):
        grads = {name: torch.randn_like(value) for name, value in params.items()}
        params, state = rule.update(meta, grads, state, params)
        g = torch.cat([grads["a"].flatten(), grads["b"][None]])
        x = g[:, None] if preprocessing == "none" else log_and_sign(g, 5.0, torch.finfo(torch.float32).eps)
        for layer, cell in enumerate(cells):
            own[layer] = cell(x, own.get(layer))
            x = own[layer][0]
        flat = flat + 0.1 * (x @ meta["head/weight"] + meta["head/bias"]).squeeze(1)
    found = torch.cat([params["a"].flatten(), params["b"][None]])
    torch.testing.assert_close(found, flat, rtol=1e-13, atol=1e-13)


def test_matches_both_preprocessings_in_numpy():
    g = np.array([0.0, 1e-8, -4e-5, 4.6e-5, -6e-3, 7e-3, 0.3, -1.0, 20.0, -1e6])
    far = np.abs(g) >= np.exp(-10)
    log = np.log(np.abs(g), out=np.full_like(g, -10.0), where=far)
    paper = np.stack([np.where(far, log / 10, -1), np.where(far, np.sign(g), np.exp(10) * g)], -1)
    eps = np.finfo(np.float32).eps
    released = np.stack([np.maximum(np.log(np.abs(g) + eps) / 5, -1), np.clip(g * np.exp(5), -1, 1)], -1)
    grads_P = torch.from_numpy(g).requires_grad_()
    for preprocessing, wanted in (("paper", paper), ("released", released)):
        found, _ = CoordinateLSTM(preprocessing=preprocessing).read(grads_P, {}, grads_P)
        np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-14, atol=1e-14)
        assert torch.autograd.grad(found.sum(), grads_P)[0].isfinite().all()


def test_runs_side_by_side_are_runs_by_themselves():
    rule, layout = CoordinateLSTM((4, 3)), Layout.of({"w": torch.zeros(5)})
    metas = [{name: value.double() for name, value in rule.init_meta(key(number)).items()} for number in range(3)]
    x_32P, g_32P = torch.randn(2, 3, 2, 5, dtype=torch.float64)

    def run(meta, x_P, g_P):
        state = rule.start(meta, layout, x_P)
        for _ in range(3):
            direction_P, state = rule.direction(meta, layout, g_P, state, x_P, None)
            x_P = x_P - direction_P
        return x_P, state

    own = tree.stack([tree.stack([run(metas[i], x_32P[i, j], g_32P[i, j]) for j in range(2)]) for i in range(3)])
    each = vmap(vmap(run, (None, 0, 0)))(tree.stack(metas), x_32P, g_32P)
    repeated = tree.map(lambda leaf: leaf.unsqueeze(1).expand(3, 2, *leaf.shape[1:]), tree.stack(metas))
    shared = tree.index(own, 0), run(metas[0], x_32P[0], g_32P[0])
    for wanted, found in ((own, each), (own, run(repeated, x_32P, g_32P)), shared):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_weights_begin_as_cut_normal_numbers_with_open_forget_gates():
    rule = CoordinateLSTM((50, 50))
    meta = rule.init_meta(key(0))
    torch.testing.assert_close(meta, rule.init_meta(key(0)), rtol=0, atol=0)
    fan_in = 100
    values = meta["1/weight"] * fan_in**0.5
    assert values.abs().max() <= 2.0
    assert not torch.equal(values[:50], rule.init_meta(key(1))["1/weight"][:50] * 10)
    torch.testing.assert_close(values.std(), torch.tensor(0.8796), rtol=0, atol=0.01)  # of N(0, 1) within 2
    gates = meta["1/bias"].unflatten(0, (4, 50)).mean(1)
    torch.testing.assert_close(gates, torch.tensor([0.0, 1.0, 0.0, 0.0]), rtol=0, atol=0.05)


def test_refuses_what_it_cannot_be():
    with pytest.raises(ValueError, match=r"size of a layer is 0; accepted: 1 <="):
        CoordinateLSTM((20, 0))
    with pytest.raises(ValueError, match=r"preprocessing is 'log'; accepted: 'none', 'paper', 'released'"):
        CoordinateLSTM(preprocessing="log")
    with pytest.raises(ValueError, match=r"scale is 0.0; accepted: 0 < scale < inf"):
        CoordinateLSTM(scale=0.0)
