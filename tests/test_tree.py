import pytest
import torch
from torch import nn

from metalearn import tree
from metalearn.base import InnerState
from metalearn.random import key


def state():
    step = torch.tensor(3)
    return InnerState(
        {"0.weight": torch.ones(2, 3), "b": torch.zeros(4)}, {}, {"count": step}, step, {"h": torch.ones(())}
    )


def test_split_finds_what_carries_gradients_and_merges_it_back():
    floats, merge = tree.split(state())
    assert [leaf.shape for leaf in floats] == [(2, 3), (4,), ()]
    doubled = merge([2 * leaf for leaf in floats])
    assert doubled.params["0.weight"].eq(2).all() and doubled.step == 3 and isinstance(doubled, InnerState)


def test_matches_flat_vectors():
    params = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    vector, unravel = tree.ravel(params)
    assert vector.shape == (10,)
    torch.testing.assert_close(unravel(vector), params)
    assert unravel(torch.stack([vector, vector]))["a"].shape == (2, 2, 3)
    torch.testing.assert_close(tree.dot(params, params), vector @ vector)
    torch.testing.assert_close(tree.norm(params), vector.norm())
    torch.testing.assert_close(tree.ravel(tree.add(params, params, -0.5))[0], vector / 2)


def test_packed_state_loads_as_builtins_and_round_trips(tmp_path):
    packed = tree.pack(state())
    assert "params/0.weight" in packed and "rule/count" in packed
    torch.save(packed, tmp_path / "state.pt")
    back = tree.unpack(state(), torch.load(tmp_path / "state.pt", weights_only=True))
    torch.testing.assert_close(back, state(), rtol=0, atol=0)


def test_unpack_names_what_differs():
    packed = tree.pack(state())
    with pytest.raises(ValueError, match="params/b"):
        tree.unpack(state(), {name: leaf for name, leaf in packed.items() if name != "params/b"})
    with pytest.raises(ValueError, match=r"params/b is saved as \(5,\); accepted: \(4,\)"):
        tree.unpack(state(), packed | {"params/b": torch.zeros(5)})


def test_call_matches_the_module_and_changes_nothing():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    params, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    before = {name: value.clone() for name, value in buffers.items()}
    x = torch.randn(8, 3)
    output, after = tree.call(module, params, buffers, x)
    torch.testing.assert_close(buffers, before, rtol=0, atol=0)
    torch.testing.assert_close(module(x), output)
    torch.testing.assert_close(dict(module.named_buffers()), after)


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1)])
def test_batch_norm_of_one_value_per_channel_matches_torchs_refusal(shape):
    for module in (nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False)):
        with pytest.raises(ValueError) as wanted:
            module(torch.ones(shape))
        with pytest.raises(ValueError) as found:
            tree.call(module, dict(module.named_parameters()), dict(module.named_buffers()), torch.ones(shape))
        assert str(found.value) == str(wanted.value)
    module = nn.BatchNorm1d(4).eval()
    found, _ = tree.call(module, dict(module.named_parameters()), dict(module.named_buffers()), torch.ones(shape))
    torch.testing.assert_close(found, module(torch.ones(shape)))


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


X = torch.ones(3, 2, 4)
MODULES = {
    **{f"{kind.__name__} {rate}": (kind(rate), X) for kind in (nn.Dropout, nn.AlphaDropout) for rate in (0.0, 0.5)},
    **{f"attention {rate}": (Attention(4, 2, dropout=rate), X) for rate in (0.0, 0.5)},
    **{f"encoder {rate}": (nn.TransformerEncoderLayer(4, 2, dropout=rate), X) for rate in (0.0, 0.5)},
    **{
        f"{kind.__name__} {rate}": (kind(4, 4, 2, dropout=rate), X) for kind in (nn.LSTM, nn.GRU) for rate in (0.0, 0.5)
    },
    "Dropout1d": (nn.Dropout1d(0.5), X),
    "RReLU": (nn.RReLU(), -X),
    "nested": (nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Dropout(0.1))), X),
    "none": (nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(), nn.LayerNorm(4)), X),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_draws_matches_what_a_call_does_to_the_global_generator(name, training):
    module, x = MODULES[name]
    module.train(training)
    before = torch.get_rng_state()
    module(x)
    assert tree.draws(module) == (not torch.equal(torch.get_rng_state(), before))


def test_draws_knows_parts_in_training_mode_alone():
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4))
    module[0].eval()
    assert not tree.draws(module) and tree.draws(module.train())


def test_initialise_is_a_function_of_the_key_alone():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.MultiheadAttention(4, 1))
    own = {name: value.clone() for name, value in module.state_dict().items()}
    generator = torch.random.get_rng_state()
    first, again, other = (tree.initialise(module, key(seed)) for seed in (0, 0, 1))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first[0]["2.in_proj_weight"], other[0]["2.in_proj_weight"])
    assert not torch.equal(first[0]["0.weight"], other[0]["0.weight"]) and first[1]["1.running_var"].eq(1).all()
    torch.testing.assert_close(module.state_dict(), own, rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), generator)
