import importlib.util

import pytest
import torch

from metalearn import random
from metalearn.models.write_rules import Writes, write_apart, write_in_turn

RULES = ("sum", "delta", "gated delta")


def draw(rule, length, sequences=2, heads=3, keys=4, values=5):
    """Writes of one rule and a state that is not zero, in float64."""
    lead = (sequences, heads, length)
    parts = [random.normal(random.key(i), (*lead, size)).double() for i, size in enumerate((keys, keys, values, 1, 1))]
    parts[1] = torch.nn.functional.normalize(parts[1], dim=-1)
    parts[3], parts[4] = parts[3].sigmoid(), -parts[4].exp()
    state = random.normal(random.key(9), (sequences, heads, keys, values)).double()
    return Writes(*parts[: 3 + RULES.index(rule)]), state


def loop(writes, state):
    """One token of one head of one sequence at a time."""
    outs, ends = [], []
    for b in range(len(state)):
        for h in range(state.shape[1]):
            matrix = state[b, h]
            for t in range(writes.keys.shape[2]):
                query, key, value = (part[b, h, t] for part in writes[:3])
                if writes.log_decays is not None:
                    matrix = matrix * writes.log_decays[b, h, t].exp()
                new = value
                if writes.rates is not None:
                    new = writes.rates[b, h, t] * (value - key @ matrix)
                matrix = matrix + torch.outer(key, new)
                outs.append(query @ matrix)
            ends.append(matrix)
    return torch.stack(outs).reshape(writes.values.shape), torch.stack(ends).reshape(state.shape)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("length", "chunk_size"), [(11, 4), (3, 8), (8, 4), (5, 1)])
def test_matches_loop_with_gradients(rule, length, chunk_size):
    writes, state = draw(rule, length)
    inputs = [part.requires_grad_() for part in (*writes, state) if part is not None]
    weights = [
        random.normal(random.key(20 + i), shape.shape).double() for i, shape in enumerate((writes.values, state))
    ]
    results = []
    for pair in (write_in_turn(writes, state, chunk_size), loop(writes, state)):
        total = sum((weight * part).sum() for weight, part in zip(weights, pair, strict=True))
        results.append([*pair, *torch.autograd.grad(total, inputs)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_matches_one_more_write_each_for_tokens_apart(rule):
    writes, state = draw(rule, 6)
    apart = write_apart(writes, state)
    for t in range(6):
        alone = Writes(*(None if part is None else part[:, :, t : t + 1] for part in writes))
        torch.testing.assert_close(apart[:, :, t : t + 1], loop(alone, state)[0], rtol=1e-12, atol=1e-12)


def test_delta_rule_replaces_what_the_sum_rule_adds_to():
    key, values = torch.eye(2)[:1].expand(1, 1, 2, 2), torch.tensor([3.0, 5.0]).reshape(1, 1, 2, 1)
    empty, ones = torch.zeros(1, 1, 2, 1), torch.ones(1, 1, 2, 1)
    assert write_in_turn(Writes(key, key, values), empty, 2)[0].flatten().tolist() == [3, 8]
    assert write_in_turn(Writes(key, key, values, ones), empty, 2)[0].flatten().tolist() == [3, 5]


def test_matches_float64_loop_in_float32_where_all_keys_are_one():
    writes, state = draw("delta", 200, sequences=1, heads=1)
    writes = writes._replace(keys=writes.keys[:, :, :1].expand_as(writes.keys), rates=1 - 1e-3 * writes.rates)
    single = Writes(*(None if part is None else part.float() for part in writes))
    out, end = write_in_turn(single, state.float(), 64)
    expected = loop(writes, state)
    torch.testing.assert_close((out.double(), end.double()), expected, rtol=1e-5, atol=1e-5)


def test_matches_float64_loop_in_float32_where_decays_are_extreme():
    writes, state = draw("gated delta", 40, sequences=1, heads=1)
    decays = torch.tensor([0.0, -1e-6, -3.0, -80.0, -1e4]).double().repeat(8).reshape(1, 1, 40, 1)
    writes = writes._replace(log_decays=decays)
    single = Writes(*(part.float().requires_grad_() for part in writes))
    out, end = write_in_turn(single, state.float(), 16)
    torch.testing.assert_close((out.double(), end.double()), loop(writes, state), rtol=1e-4, atol=1e-4)
    (out.sum() + end.sum()).backward()
    assert all(part.grad.isfinite().all() for part in single)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs flash-linear-attention")
@pytest.mark.parametrize("rule", RULES)
def test_matches_kernels_of_flash_linear_attention(rule):
    writes, state = draw(rule, 150, sequences=2, heads=4, keys=32, values=33 if rule == "sum" else 32)
    writes = Writes(*(None if part is None else part.float().cuda() for part in writes))
    inputs = [part.requires_grad_() for part in writes if part is not None]
    results = []
    for kernel in ("torch", "fla"):
        out, end = write_in_turn(writes, state.float().cuda(), 64, kernel)
        results.append([out, end, *torch.autograd.grad(out.square().mean() + end.square().mean(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < 0.02 * ours.norm()  # their tokens are bfloat16
