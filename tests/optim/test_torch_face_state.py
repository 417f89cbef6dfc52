"""States of ``LearnedOptimizer``: copied, saved, loaded, refused."""

import copy
import io
import pickle

import pytest
import torch
from optim.face_tasks import assert_same, by_name, descend, lively, problem
from torch import nn

from metalearn import tree
from metalearn.optim.mlp import MLPRule
from metalearn.optim.small_mlp import SmallMLP
from metalearn.optim.torch_face import LearnedOptimizer


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_goes_on_by_itself(through):
    params, loss = problem()
    optimizer = LearnedOptimizer(params, lively(SmallMLP), lr=0.5)
    descend(optimizer, loss, 3)
    values = by_name(params)
    copied, own = through((optimizer, params))
    assert copied.param_groups[0]["params"][2] is own[2] and copied.param_groups[0]["lr"] == 0.5
    for p, q in zip(params, own, strict=True):
        q.grad = p.grad.clone()
    copied.step()
    assert_same(params, values.values())
    optimizer.step()
    assert_same(params, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_state_dictionary_goes_on_bit_for_bit(dtype):
    """With parts that fell apart, and what the rule keeps in float32 where parameters are halves."""
    params, loss = problem(dtype)
    optimizer = LearnedOptimizer(params, lively(SmallMLP), lr=0.5, weight_decay=0.01)
    descend(optimizer, loss, 3)
    descend(optimizer, loss, 2, params[1:2])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    others, other_loss = problem(dtype)
    resumed = LearnedOptimizer(others, SmallMLP())  # of other weights, which the state brings along
    for p, value in zip(others, params, strict=True):
        p.data = value.detach().clone()
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert len(resumed.state) == 2 and resumed.param_groups[0]["lr"] == 0.5
    kept = {leaf.dtype for part in resumed.state.values() for leaf in tree.leaves(part["tree"])}
    assert kept == {torch.int64, torch.float64 if dtype == torch.float64 else torch.float32}
    descend(optimizer, loss, 3)
    descend(resumed, other_loss, 3)
    assert_same(params, others)


@pytest.mark.parametrize("saved", [False, True])
def test_states_follow_parameters_whose_groups_change_places(saved):
    (params, loss), (others, other_loss) = problem(), problem()
    optimizer = LearnedOptimizer([{"params": [p]} for p in params], lively(SmallMLP))
    other = LearnedOptimizer([{"params": [p]} for p in others], lively(SmallMLP))
    descend(optimizer, loss, 2)
    descend(other, other_loss, 2)
    other.param_groups.reverse()
    if saved:
        state = other.state_dict()
        other = LearnedOptimizer([{"params": [p]} for p in reversed(others)], SmallMLP())
        other.load_state_dict(state)
    descend(optimizer, loss, 3)
    descend(other, other_loss, 3)
    assert_same(others, params)
    other.param_groups.reverse()
    copied, own = copy.deepcopy((other, others))
    for p, q in zip(others, own, strict=True):
        q.grad = p.grad.clone()
    other.step()
    copied.step()
    assert_same(own, others)


def test_a_group_that_is_taken_out_takes_its_state_along():
    """What is left goes on as if the other parameters had no gradients any more."""
    (params, loss), (others, other_loss) = problem(), problem()
    optimizer = LearnedOptimizer(params, lively(SmallMLP))
    other = LearnedOptimizer([{"params": others[:2]}, {"params": others[2:]}], lively(SmallMLP))
    descend(optimizer, loss, 2)
    descend(other, other_loss, 2)
    del other.param_groups[0]
    for p in (*params[:2], *others[:2]):
        p.requires_grad_(False)
    descend(optimizer, loss, 3)
    descend(other, other_loss, 3)
    assert_same(others, params)
    assert [part["members"] for part in other.state_dict()["state"].values()] == [[0, 1]]


def test_hooks_come_before_a_state_is_checked_and_after_it_is_taken():
    (params, loss), (others, _) = problem(), problem()
    optimizer, other = LearnedOptimizer(params, lively(SmallMLP)), LearnedOptimizer(others, SmallMLP())
    descend(optimizer, loss, 1)
    optimizer.register_state_dict_post_hook(lambda _, saved: {"wrapped": saved})
    other.register_load_state_dict_pre_hook(lambda _, saved: saved["wrapped"])
    seen = []
    other.register_load_state_dict_post_hook(lambda each: seen.append(each.rule))
    other.load_state_dict(optimizer.state_dict())
    assert seen == [other.rule]
    assert_same(other.rule.weights.values(), optimizer.rule.weights.values())


def test_loading_leaves_the_rule_that_was_given_and_the_state_that_was_saved_alone():
    rule, (params, loss), (others, _) = SmallMLP(), problem(), problem()
    weights = {name: value.clone() for name, value in rule.weights.items()}
    optimizer, other = LearnedOptimizer(params, rule), LearnedOptimizer(others, lively(SmallMLP))
    optimizer.load_state_dict(other.state_dict())
    assert all(torch.equal(value, weights[name]) for name, value in rule.weights.items())
    descend(optimizer, loss, 1)
    saved = optimizer.state_dict()
    before = [leaf.clone() for part in saved["state"].values() for leaf in tree.leaves(part["tree"])]
    descend(optimizer, loss, 2)
    assert_same([leaf for part in saved["state"].values() for leaf in tree.leaves(part["tree"])], before)


def test_the_state_of_another_rule_is_refused(monkeypatch):
    params, loss = problem()
    optimizer = LearnedOptimizer(params, SmallMLP())
    descend(optimizer, loss, 1)
    saved, values = optimizer.state_dict(), by_name(params)
    with pytest.raises(ValueError, match=r"rule with \{'class_path': '.*SmallMLP'"):
        LearnedOptimizer(params, MLPRule()).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"'step_mult': 0.01.*accepted: .*'step_mult': 0.5"):
        LearnedOptimizer(params, SmallMLP(step_mult=0.5)).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"a rule with .*None"):
        optimizer.load_state_dict(torch.optim.Adam(params).state_dict())
    reshaped = LearnedOptimizer([nn.Parameter(torch.zeros(5)) for _ in params], SmallMLP())
    with pytest.raises(ValueError, match="parameters of other shapes"):
        reshaped.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"of parameters \[0, 1, 2, 3\]; accepted: 0 ... 0"):
        LearnedOptimizer(params[:1], SmallMLP()).load_state_dict(saved)
    monkeypatch.setattr(SmallMLP, "version", SmallMLP.version + 1)
    with pytest.raises(ValueError, match=r"\{'version': 1\}; accepted: \{'version': 2\}"):
        optimizer.load_state_dict(saved)
    assert_same(params, values.values())
