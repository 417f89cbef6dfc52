import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from metalearn import random
from metalearn.models.fast_weights import DeltaNet, GatedDeltaNet, LinearAttention

SIZES = dict(width=12, depth=2, heads=2, head_width=5, mlp_ratio=2)
LEARNERS = [
    (LinearAttention, dict(normalise=True)),
    (LinearAttention, dict(normalise=False)),
    (DeltaNet, dict()),
    (GatedDeltaNet, dict(convolution=3)),
]


@pytest.fixture(params=LEARNERS, ids=lambda p: f"{p[0].__name__}-{p[1]}")
def learner(request):
    torch.manual_seed(0)
    kind, arguments = request.param
    return kind(7, 4, **SIZES, chunk_size=4, **arguments)


def tokens(sequences=3, length=10):
    return random.normal(random.key(1), (sequences, length, 7))


def written_out(learner, x):
    """Logits (T, K) of one sequence (T, D), one token and one head at a time, from the weights and the papers' formulas."""
    p = {name: value.detach() for name, value in learner.named_parameters()}
    width, heads, size, taps = learner.width, learner.heads, learner.head_width, learner.convolution

    def linear(name, value):
        return p[name + ".weight"] @ value + p[name + ".bias"]

    def norm(name, value):
        return functional.layer_norm(value, (width,), p[name + ".weight"], p[name + ".bias"])

    stream = [linear("embed", token) for token in x]
    for layer in range(learner.depth):
        name = f"blocks.{layer}."
        normed = [norm(name + "attention_norm", token) for token in stream]
        projected = [linear(name + "project_in", token) for token in normed]
        if taps > 1:
            past = [torch.zeros_like(projected[0])] * (taps - 1) + projected
            projected = [sum(p[name + "taps"][i] * past[t + i] for i in range(taps)) for t in range(len(x))]
        answers = [torch.zeros(0, dtype=x.dtype)] * len(x)
        for head in range(heads):
            matrix, total = torch.zeros(size, size, dtype=x.dtype), torch.zeros(size, dtype=x.dtype)  # values x keys
            for t in range(len(x)):
                q, k, v = projected[t].reshape(3, heads, size)[:, head]
                if isinstance(learner, LinearAttention):
                    q, k = (torch.where(part > 0, part + 1, part.exp()) for part in (q, k))
                    if not learner.normalise:
                        q, k = q / (q.sum() + 1e-6), k / (k.sum() + 1e-6)
                    matrix, total = matrix + torch.outer(v, k), total + k
                    answer = matrix @ q / (total @ q + 1e-6 if learner.normalise else 1)
                else:
                    q, k, v = (part / (1 + (-part).exp()) for part in (q, k, v))
                    q, k = q / q.norm(), k / k.norm()
                    if isinstance(learner, GatedDeltaNet):
                        pace = (1 + linear(name + "decay", normed[t])[head].exp()).log()
                        matrix = matrix * (-p[name + "log_scale"][head].exp() * pace).exp()
                    rate = 1 / (1 + (-linear(name + "rate", normed[t])[head]).exp())
                    matrix = matrix @ (torch.eye(size, dtype=x.dtype) - rate * torch.outer(k, k))
                    matrix = matrix + rate * torch.outer(v, k)
                    answer = matrix @ q
                    answer = answer / (answer.square().mean() + 1e-5).sqrt()
                answers[t] = torch.cat([answers[t], answer])
        for t in range(len(x)):
            stream[t] = stream[t] + linear(name + "project_out", answers[t])
            hidden = functional.gelu(linear(name + "mlp.0", norm(name + "mlp_norm", stream[t])))
            stream[t] = stream[t] + linear(name + "mlp.2", hidden)
    return torch.stack([linear("head", norm("norm", token)) for token in stream])


def test_matches_learner_written_out(learner):
    learner, x = learner.double(), tokens(2).double()
    logits = learner(x)
    for sequence, expected in zip(x, logits, strict=True):
        torch.testing.assert_close(written_out(learner, sequence), expected, rtol=1e-11, atol=1e-11)


def test_matches_single_learners_when_stacked(learner):
    others = {n: p + 0.1 * random.normal(random.key(5), p.shape) for n, p in learner.double().named_parameters()}
    members = [
        {n: p.detach() for n, p in parameters.items()} for parameters in (dict(learner.named_parameters()), others)
    ]
    x, y = tokens(6).double().unflatten(0, (2, 3)), torch.arange(60).reshape(2, 3, 10) % 4

    def loss(parameters, x, y):
        return functional.cross_entropy(
            torch.func.functional_call(learner, parameters, (x,)).flatten(0, 1), y.flatten()
        )

    gradient = torch.func.grad_and_value(loss)
    stacked = {n: torch.stack([member[n] for member in members]) for n in others}
    gradients, values = torch.func.vmap(gradient)(stacked, x, y)
    for i, member in enumerate(members):
        expected, value = gradient(member, x[i], y[i])
        torch.testing.assert_close(({n: g[i] for n, g in gradients.items()}, values[i]), (expected, value))


def test_state_stays_in_float32_under_bfloat16(learner):
    state = learner.init_state(3, "cpu", torch.float32)
    exact = learner.branch(tokens(3, 4), learner.prefill(tokens(), state)[1])
    with torch.autocast("cpu", torch.bfloat16):
        state = learner.prefill(tokens(), state)[1]
        close = learner.branch(tokens(3, 4), state)
    assert all(leaf.dtype == torch.float32 for leaf in state.values())
    assert close.isfinite().all() and (close.float() - exact).abs().max() < 0.1


@pytest.mark.parametrize("length", [1, 3, 10])
def test_flops_match_torchs_counter_and_triangles_by_hand(learner, length):
    with FlopCounterMode(display=False) as counter:
        learner(tokens(1, length))
    # The counter sees squares where we count triangles, and sees neither solves nor elementwise convolutions.
    size, delta = learner.head_width, isinstance(learner, DeltaNet)
    both = size + learner.value_width
    unseen = 0
    for start in range(0, length, learner.chunk_size):
        chunk = min(learner.chunk_size, length - start)
        triangle = chunk * (chunk - 1) // 2
        unseen -= learner.heads * 2 * triangle * both  # queries by keys, and by values
        if delta:
            unseen += learner.heads * 2 * (triangle - (triangle + chunk)) * size  # the solve; keys by keys
    if learner.convolution > 1:
        unseen += length * 2 * 3 * learner.heads * size * learner.convolution
    total = counter.get_total_flops() + learner.depth * unseen
    assert abs(total / length - learner.flops_per_token(length)) <= 0.5


def test_state_size_counts_what_each_option_keeps():
    per_head = {LinearAttention: 5 * 6, DeltaNet: 5 * 5, GatedDeltaNet: 5 * 5}
    for kind, floats in per_head.items():
        assert kind(7, 4, **SIZES).state_size(100) == 2 * 2 * floats
        assert kind(7, 4, **SIZES, convolution=4).state_size(1) == 2 * 2 * (floats + 3 * 3 * 5)


@pytest.mark.parametrize("kind", [LinearAttention, DeltaNet, GatedDeltaNet])
def test_refuses_sizes_and_kernels_by_name(kind, monkeypatch):
    monkeypatch.setattr("metalearn.models.write_rules.importlib.util.find_spec", lambda name: None)
    for argument, value, message in [
        ("convolution", 0, "convolution is 0; accepted: 1 <= convolution"),
        ("chunk_size", 0, "chunk_size is 0"),
        ("kernel", "cuda", "kernel is 'cuda'; accepted: 'torch', 'fla'"),
        ("kernel", "fla", "flash-linear-attention is not installed; accepted here: 'torch'"),
    ]:
        with pytest.raises(ValueError, match=message):
            kind(7, 4, **SIZES, **{argument: value})
    monkeypatch.setattr("metalearn.models.write_rules.importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device; accepted here: 'torch'"):
        kind(7, 4, **SIZES, kernel="fla")
