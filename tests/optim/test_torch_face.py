import functools
import pickle

import pytest
import torch
from optim.face_tasks import LossScaled, assert_same, by_name, descend, functional_run, lively, problem
from torch import nn

from metalearn import tree
from metalearn.optim import saving
from metalearn.optim.dynamic_mode import DynamicModeLSTM
from metalearn.optim.factored_mlp import FactoredMLP
from metalearn.optim.hyper import NNAdam
from metalearn.optim.learnable import LearnableAdam, LearnableMomentum, LearnableSGD
from metalearn.optim.lstm import CoordinateLSTM
from metalearn.optim.mlp import MLPRule
from metalearn.optim.saving import save_rule
from metalearn.optim.small_mlp import SmallMLP
from metalearn.optim.star import STAR
from metalearn.optim.torch_face import LearnedOptimizer

APART = [
    CoordinateLSTM,
    FactoredMLP,
    LearnableAdam,
    LearnableSGD,
    MLPRule,
    NNAdam,
    SmallMLP,
    STAR,
]  # tensors see nothing of one another


@pytest.mark.parametrize("kind", [*APART, DynamicModeLSTM], ids=lambda kind: kind.__name__)
def test_matches_the_functional_rule_bit_for_bit(kind):
    rule, (params, loss) = lively(kind), problem()
    others, other_loss = problem()
    expected, state = functional_run(rule, others, other_loss, 12)
    optimizer = LearnedOptimizer(params, rule)
    before = by_name(params)
    descend(optimizer, loss, 12)
    assert not torch.equal(params[2], before["2"])
    assert_same(params, expected.values())
    (part,) = optimizer.state.values()
    assert_same(tree.leaves(part["tree"]), tree.leaves(state))  # and no more than the rule's own


@pytest.mark.parametrize("kind", [LearnableAdam, SmallMLP, FactoredMLP], ids=lambda kind: kind.__name__)
def test_compiles_without_a_break(monkeypatch, kind):
    (params, loss), (others, other_loss) = problem(), problem()
    rule, traced = lively(kind), functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", traced)
    descend(LearnedOptimizer(params, rule), loss, 3)
    compiled = LearnedOptimizer(others, rule, compile=True)
    descend(compiled, other_loss, 3)
    assert_same(params, others, 1e-6)
    assert pickle.loads(pickle.dumps(compiled)).compile


def test_however_many_optimizers_are_compiled_each_once(monkeypatch):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    for size in range(2, 14):  # torch compiles one function eight times at most
        p = nn.Parameter(torch.ones(size))
        optimizer = LearnedOptimizer([p], lively(LearnableAdam), compile=True)
        for _ in range(2):
            p.grad = torch.ones(size)
            optimizer.step()
        assert len(graphs) == size - 1


@pytest.mark.parametrize("kind", [SmallMLP, FactoredMLP, STAR], ids=lambda kind: kind.__name__)
def test_autocast_changes_nothing(kind):
    (params, loss), (others, other_loss) = problem(), problem()
    rule = lively(kind)
    descend(LearnedOptimizer(params, rule), loss, 3)
    optimizer = LearnedOptimizer(others, rule)
    for _ in range(3):
        optimizer.zero_grad()
        other_loss().backward()
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.step()
    assert_same(params, others)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_takes_the_same_steps():
    (params, loss), (others, other_loss) = problem(), problem()
    rule = lively(SmallMLP)
    descend(LearnedOptimizer(params, rule), loss, 5)
    compiled = LearnedOptimizer(others, rule, compile=True)
    descend(compiled, other_loss, 5)
    assert_same(params, others, 1e-6)


def test_matches_groups_with_rates_and_decay_of_their_own():
    (params, loss), (others, _) = problem(torch.float64), problem(torch.float64)
    rule = lively(SmallMLP)
    groups = [{"params": params[:2], "lr": 0.5}, {"params": params[2:], "weight_decay": 0.1}]
    optimizer = LearnedOptimizer(groups, rule, lr=2.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    state = rule.init({}, by_name(others))
    for halvings in range(4):
        descend(optimizer, loss, 1)
        schedule.step()
        grads = {str(place): p.grad for place, p in enumerate(params)}
        moved, state = rule.update({}, grads, state, by_name(others))
        for place, other in enumerate(others):
            lr, decay = (0.5, 0.0) if place < 2 else (2.0, 0.1)
            lr *= 0.5**halvings
            direction = other.detach() - moved[str(place)]
            other.data = other.detach() * (1 - lr * decay) - lr * direction
    assert_same(params, others, 1e-12)


def test_the_closure_is_called_once_with_gradients_on_and_its_loss_returned():
    params, loss = problem()
    optimizer, calls = LearnedOptimizer(params, lively(SmallMLP)), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    with torch.no_grad():
        expected = loss()
    assert torch.equal(optimizer.step(closure), expected) and calls == [True]
    others, other_loss = problem()
    descend(LearnedOptimizer(others, lively(SmallMLP)), other_loss, 1)
    assert_same(params, others)


def test_matches_a_rule_that_asks_for_the_loss():
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = LearnedOptimizer([p], LossScaled())
    optimizer.step()  # no gradient: nothing to do, and nothing to ask for

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert p.item() == 3.0 - 0.5 * 9.0 * 6.0
    p.grad = torch.tensor([2.0])
    assert optimizer.step(loss=4.0) is None and p.item() == -24.0 - 0.5 * 4.0 * 2.0
    with pytest.raises(ValueError, match=r"LossScaled needs the loss, which is None; accepted: a closure"):
        optimizer.step()


@pytest.mark.parametrize("kind", APART, ids=lambda kind: kind.__name__)
def test_matches_tensors_optimized_apart_when_some_have_no_gradient(kind):
    """Neither do parameters without a gradient move, nor does anything that the rule keeps of them."""
    rule, (params, loss) = lively(kind), problem(torch.float64)
    optimizer, apart = LearnedOptimizer(params, rule), problem(torch.float64)[0]
    each = [LearnedOptimizer([p], rule) for p in apart]
    for missing in ([0, 3], [], [1, 3], [3, 1], [], [0, 1, 2, 3], [2]):
        before = by_name(params)
        descend(optimizer, loss, 1, [params[place] for place in missing])
        for place, other in enumerate(each):
            apart[place].grad = params[place].grad
            other.step()
        assert all(torch.equal(params[place], before[str(place)]) for place in missing)
    assert_same(params, apart, 1e-12)


def test_a_state_that_cannot_be_divided_is_refused():
    class Mixed(LearnableMomentum):
        def start(self, meta, layout, params_P):
            return {"momentum": torch.zeros_like(params_P), "lags": params_P.new_zeros(len(layout.sizes) ** 2)}

        def direction(self, meta, layout, grads_P, state, params_P, loss):
            direction_P, after = super().direction(meta, layout, grads_P, state, params_P, loss)
            return direction_P, state | after

    params, loss = problem()
    optimizer = LearnedOptimizer(params, Mixed())
    descend(optimizer, loss, 1)
    with pytest.raises(ValueError, match="lags of the rule's state belongs to several tensors"):
        descend(optimizer, loss, 1, params[:1])


def test_parameters_of_a_later_group_begin_anew():
    (params, loss), (others, other_loss) = problem(), problem()
    rule = lively(LearnableAdam)
    late = LearnedOptimizer(params[:2], rule)
    descend(late, loss, 3)
    late.add_param_group({"params": params[2:]})
    descend(late, loss, 3)
    first, second = LearnedOptimizer(others[:2], rule), LearnedOptimizer(others[2:], rule)
    descend(first, other_loss, 3)
    for _ in range(3):
        first.zero_grad(), second.zero_grad()
        other_loss().backward()
        first.step(), second.step()
    assert_same(params, others)


@pytest.mark.parametrize("p", [torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.int64)])
def test_parameters_that_are_not_real_numbers_are_refused(p):
    good = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=f"a parameter is of {p.dtype}; accepted"):
        LearnedOptimizer([good, p], SmallMLP())
    optimizer = LearnedOptimizer([good], SmallMLP())
    with pytest.raises(ValueError, match=f"a parameter is of {p.dtype}; accepted"):
        optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = LearnedOptimizer(table.parameters(), SmallMLP())
    table(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(ValueError, match="a gradient is sparse; accepted: dense gradients"):
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "value"), [("lr", -1.0), ("weight_decay", -0.1), ("lr", float("nan")), ("lr", "1"), ("lr", torch.ones(2))]
)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*; accepted: 0 <= {name} < inf"):
        LearnedOptimizer([nn.Parameter(torch.zeros(1))], SmallMLP(), **{name: value})


def test_a_rate_may_be_a_tensor_of_one_and_a_group_may_not_go_uphill():
    (params, loss), (others, other_loss) = problem(), problem()
    descend(LearnedOptimizer(params, SmallMLP(), lr=0.5, weight_decay=0.25), loss, 2)
    descend(
        LearnedOptimizer(others, SmallMLP(), lr=torch.full((1,), 0.5), weight_decay=torch.tensor(0.25)), other_loss, 2
    )
    assert_same(others, params)
    with pytest.raises(ValueError, match=r"maximize is True, .*; accepted: False"):
        LearnedOptimizer([{"params": params, "maximize": True}], SmallMLP())


@pytest.mark.parametrize("rule", [3, SmallMLP, nn.Linear(1, 1)])
def test_what_is_no_rule_is_refused(rule):
    with pytest.raises(ValueError, match=r"rule is .*; accepted: a file, the name of a rule of the package, or a"):
        LearnedOptimizer([nn.Parameter(torch.zeros(1))], rule)


def test_matches_the_update_in_float32_where_parameters_are_halves():
    p, g = torch.randn(5, 3).bfloat16(), torch.randn(5, 3).bfloat16()
    rule, q = lively(SmallMLP), nn.Parameter(p.clone())
    optimizer, state, value = LearnedOptimizer([q], rule), rule.init({}, {"0": p.float()}), p
    for _ in range(3):
        q.grad = g.clone()
        optimizer.step()
        moved, state = rule.update({}, {"0": g.float()}, state, {"0": value.float()})
        value = moved["0"].bfloat16()
    assert torch.equal(q, value)


def test_halves_that_decay_are_rounded_once():
    class Constant(LearnableSGD):
        def direction(self, meta, layout, grads_P, state, params_P, loss):
            return grads_P, state

    p, g = torch.randn(1000).bfloat16(), torch.randn(1000).bfloat16()
    q = nn.Parameter(p.clone())
    q.grad = g
    LearnedOptimizer([q], Constant(), lr=0.1, weight_decay=0.3).step()
    assert torch.equal(q, (p.float() * (1 - 0.1 * 0.3) - 0.1 * g.float()).bfloat16())


def test_matches_each_precision_by_itself():
    (singles, single_loss), (doubles, double_loss) = problem(), problem(torch.float64)
    rule = lively(SmallMLP)
    together = [*singles, *doubles]
    descend(LearnedOptimizer(together, rule), lambda: single_loss() + double_loss(), 3)
    for dtype, found in ((torch.float32, singles), (torch.float64, doubles)):
        params, loss = problem(dtype)
        expected, _ = functional_run(rule, params, loss, 3)
        assert_same(found, expected.values())


def test_a_gradient_scaler_skips_what_is_not_finite():
    (params, loss), (others, other_loss) = problem(), problem()
    rule = lively(SmallMLP)
    optimizer, scaler = LearnedOptimizer(params, rule), torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss()).backward()
        if step == 1:
            params[0].grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
    descend(LearnedOptimizer(others, rule), other_loss, 3)
    assert_same(params, others)


def test_clearing_the_state_starts_the_rule_again():
    (params, loss), (others, other_loss) = problem(), problem()
    rule = lively(SmallMLP)
    optimizer = LearnedOptimizer(params, rule)
    assert not optimizer.state  # and nothing is kept before the first step
    descend(optimizer, loss, 2)
    optimizer.state.clear()
    descend(optimizer, loss, 2)
    for _ in range(2):
        descend(LearnedOptimizer(others, rule), other_loss, 2)
    assert_same(params, others)


def test_rules_are_found_by_path_and_by_name(tmp_path, monkeypatch):
    rule = lively(SmallMLP)
    save_rule(tmp_path / "digits_mlp.safetensors", rule)
    monkeypatch.setattr(saving, "PACKAGED", tmp_path)
    trained = []
    for given in (rule, tmp_path / "digits_mlp.safetensors", str(tmp_path / "digits_mlp.safetensors"), None):
        params, loss = problem()
        optimizer = LearnedOptimizer(params) if given is None else LearnedOptimizer(params, given)
        descend(optimizer, loss, 2)
        trained.append(params)
    assert_same(trained[1], trained[0]), assert_same(trained[2], trained[0]), assert_same(trained[3], trained[0])
    assert repr(optimizer).startswith("LearnedOptimizer (SmallMLP of 218 weights\nParameter Group 0\n    lr: 1.0")


def test_takes_modules_in_any_memory_format():
    """Convolutions in channels-last order go where those in the usual order go."""
    trained = []
    for order in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).double().to(memory_format=order)
        optimizer = LearnedOptimizer(model.named_parameters(), lively(SmallMLP))
        x, y = torch.randn(5, 3, 4, 4, dtype=torch.float64), torch.arange(5) % 2
        descend(optimizer, lambda: nn.functional.cross_entropy(model(x), y), 3)  # noqa: B023
        trained.append(list(model.parameters()))
    assert_same(trained[0], trained[1], 1e-10)


def test_processes_agree_on_the_loss(monkeypatch):
    """Each of three has another, and all take the mean."""

    def all_reduce(loss):
        loss += 2.0 + 6.0  # those of the others

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    p, loss = nn.Parameter(torch.tensor([1.0])), torch.tensor(1.0)
    p.grad = torch.tensor([1.0])
    LearnedOptimizer([p], LossScaled()).step(loss=loss)
    assert p.item() == 1.0 - 0.5 * 3.0 and loss == 1.0
