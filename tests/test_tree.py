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


def test_where_selects_by_the_first_axis():
    new, old = {"a": torch.ones(2, 3)}, {"a": torch.zeros(2, 3)}
    assert tree.where(torch.tensor([True, False]), new, old)["a"].tolist() == [[1, 1, 1], [0, 0, 0]]


def test_call_matches_the_module_and_changes_nothing():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    params, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    before = {name: value.clone() for name, value in buffers.items()}
    x = torch.randn(8, 3)
    output, after = tree.call(module, params, buffers, x)
    torch.testing.assert_close(buffers, before, rtol=0, atol=0)
    torch.testing.assert_close(module(x), output)
    torch.testing.assert_close(dict(module.named_buffers()), after)


def test_initialise_is_a_function_of_the_key_alone():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    own = {name: value.clone() for name, value in module.state_dict().items()}
    generator = torch.random.get_rng_state()
    first, again, other = (tree.initialise(module, key(seed)) for seed in (0, 0, 1))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first[0]["0.weight"], other[0]["0.weight"]) and first[1]["1.running_var"].eq(1).all()
    torch.testing.assert_close(module.state_dict(), own, rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), generator)
