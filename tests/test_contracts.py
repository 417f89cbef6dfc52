"""What every implementer of a contract promises. A new resident adds itself to one list and gets these tests free."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from metalearn.models.fast_weights import DeltaNet, GatedDeltaNet, LinearAttention
from metalearn.models.feed_forward import FeedForward
from metalearn.models.outer_product import OuterProductLSTM
from metalearn.models.recurrent import GRU, LSTM, Recurrent
from metalearn.models.self_modifying import VSML, VSMLWithoutSymmetries
from metalearn.models.transformer import POSITIONS, Transformer

SMALL = dict(width=24, depth=2, heads=3, head_width=10)
LEARNERS = [
    *((Transformer, SMALL | dict(positions=p)) for p in POSITIONS),
    (LSTM, dict(width=20, depth=2)),
    (GRU, dict(width=20, depth=2)),
    (OuterProductLSTM, dict(width=6, heads=2)),
    (VSML, dict(width=6, message_size=3)),
    (VSML, dict(width=6, message_size=3, error_feedback=True)),
    (VSMLWithoutSymmetries, dict(grid_size=3, width=6, message_size=2, row_size=4)),
    (FeedForward, dict(width=20)),
    (LinearAttention, SMALL),
    (LinearAttention, SMALL | dict(normalise=False, convolution=2)),
    (DeltaNet, SMALL | dict(chunk_size=5)),
    (GatedDeltaNet, SMALL | dict(chunk_size=5, convolution=4)),
]


@pytest.fixture(params=LEARNERS, ids=lambda p: f"{p[0].__name__}-{p[1].get('positions', '')}")
def learner(request):
    torch.manual_seed(0)
    kind, arguments = request.param
    return kind(7, 5, **arguments).eval()


def tokens(sequences=3, length=12):
    return torch.randn(sequences, length, 7, generator=torch.Generator().manual_seed(1))


def test_matches_parallel_step_by_step(learner):
    x = tokens()
    state = learner.init_state(3, "cpu", torch.float32)
    stepped = []
    for t in range(x.shape[1]):
        logits, state = learner.step(x[:, t], state)
        stepped.append(logits)
    torch.testing.assert_close(torch.stack(stepped, 1), learner(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cut", [0, 1, 5])
def test_matches_parallel_after_a_prefill(learner, cut):
    x = tokens()
    state = learner.init_state(3, "cpu", torch.float32)
    if cut:
        first, state = learner.prefill(x[:, :cut], state)
        torch.testing.assert_close(first, learner(x)[:, :cut], rtol=1e-4, atol=1e-5)
    rest, _ = learner.prefill(x[:, cut:], state)
    torch.testing.assert_close(rest, learner(x)[:, cut:], rtol=1e-4, atol=1e-5)


def test_branches_match_one_sequence_each_and_leave_the_state_alone(learner):
    x, queries = tokens(), tokens(3, 4)
    _, state = learner.prefill(x, learner.init_state(3, "cpu", torch.float32))
    before = {name: leaf.clone() for name, leaf in state.items()}
    branched = learner.branch(queries, state)
    for q in range(4):
        alone = learner(torch.cat([x, queries[:, q : q + 1]], dim=1))[:, -1]
        torch.testing.assert_close(branched[:, q], alone, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], state[name]) for name in state)


def test_is_causal_and_listens_to_the_past(learner):
    x, remembers = tokens(), learner.state_size(12) > 0
    unchanged = learner(x)
    for t in range(x.shape[1]):
        changed = x.clone()
        changed[:, t] += 1
        difference = (learner(changed) - unchanged).abs().amax(dim=(0, 2))
        assert (difference[:t] == 0).all() and difference[t] > 0
        assert ((difference[t + 1 :] > 0) == remembers).all()


def test_state_size_counts_the_floats_of_the_state(learner):
    for length in (1, 6):
        _, state = learner.prefill(tokens(2, length), learner.init_state(2, "cpu", torch.float32))
        assert sum(leaf[0].numel() for leaf in state.values()) == learner.state_size(length)


def test_gradient_reaches_every_parameter(learner):
    learner(tokens(2, 12)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learner.parameters())


def test_matches_single_members_when_stacked(learner):
    if not learner.can_be_stacked:
        pytest.skip("says that it cannot")

    def loss(params, x):
        return torch.func.functional_call(learner, params, (x,)).square().sum()

    members = [{n: p.detach() * scale for n, p in learner.named_parameters()} for scale in (1.0, 0.8)]
    stacked = {name: torch.stack([member[name] for member in members]) for name in members[0]}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the one attention that vmap batches
        grads = torch.func.vmap(torch.func.grad(loss))(stacked, torch.stack([tokens(), tokens().flip(0)]))
    for k, x in enumerate((tokens(), tokens().flip(0))):
        alone = torch.func.grad(loss)(members[k], x)
        torch.testing.assert_close({n: g[k] for n, g in grads.items()}, alone, rtol=1e-4, atol=1e-5)


def test_keeps_its_constructor_arguments(learner):
    again = type(learner)(**{name: getattr(learner, name) for name in type(learner).__init__.__annotations__})
    again.load_state_dict(learner.state_dict())
    assert torch.equal(again(tokens()), learner(tokens()))


def test_bfloat16_is_finite_and_close(learner):
    with torch.autocast("cpu", torch.bfloat16):
        low = learner(tokens())
    assert low.isfinite().all() and (low.float() - learner(tokens())).abs().max() < 0.1


def test_flops_match_torchs_counter(learner):
    if isinstance(learner, LinearAttention | DeltaNet):
        pytest.skip("its chunks are counted in tests/models/test_fast_weights.py")
    if isinstance(
        learner, LSTM | GRU
    ):  # the counter does not see the fused cell; its matrix products are counted by hand
        weights = sum(p.numel() for n, p in learner.named_parameters() if "weight" in n)
        assert learner.flops_per_token(12) == 2 * weights
        return
    if isinstance(learner, Recurrent | FeedForward):
        with FlopCounterMode(display=False) as shorter:
            learner(tokens(1, 2))
        with FlopCounterMode(display=False) as counter:
            learner(tokens(1, 3))
        assert counter.get_total_flops() - shorter.get_total_flops() == learner.flops_per_token(12)
        return
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        learner(tokens(1, 12))
    # The counter's scores are square; ours are the causal half and the diagonal.
    square = 4 * learner.depth * learner.heads * learner.head_width * 12 * 12
    assert counter.get_total_flops() - square == 12 * learner.flops_per_token(12) - square * 13 // 24


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Transformer, dict(depth=0), "depth is 0"),
        (Transformer, dict(positions="fourier"), "'fourier'; accepted: 'rope'"),
        (Transformer, dict(positions="rope", head_width=3), "head_width is 3"),
        (LSTM, dict(width=0), "width is 0"),
        (GRU, dict(depth=0), "depth is 0"),
        (OuterProductLSTM, dict(heads=0), "heads is 0"),
        (VSML, dict(micro_ticks=0), "micro_ticks is 0"),
        (VSML, dict(bound=0.0), "bound is 0.0"),
        (VSMLWithoutSymmetries, dict(grid_size=0), "grid_size is 0"),
        (FeedForward, dict(depth=0), "depth is 0"),
    ],
)
def test_refuses_bad_sizes(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(7, 5, **arguments)


def test_learned_positions_end_somewhere():
    with pytest.raises(ValueError, match="13 tokens; accepted: at most max_length = 12"):
        Transformer(7, 5, **SMALL, positions="learned", max_length=12)(tokens(1, 13))
