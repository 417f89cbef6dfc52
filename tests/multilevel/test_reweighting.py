"""Meta-Weight-Net: its long tail, its gradient by hand, and a program of three levels with finite differences beside it."""

import functools

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

from metalearn import random
from metalearn.base import Examples, Source
from metalearn.models.vision import MLP
from metalearn.multilevel.reweighting import (
    BOTH,
    LONG_TAIL,
    META,
    SELECTION,
    RegularisedReweighting,
    Reweighting,
    tail_sizes,
)
from metalearn.optim.first_order import SGD, Adam
from metalearn.tasks.sources import ImageSource


class Clouds(Source):
    """Three classes of points around different centres, in float64, ``size`` of each in "train"."""

    num_classes = 3

    def __init__(self, size=40):
        self.size = size

    def read(self, part):
        count = self.size if part == "train" else 30
        targets = torch.arange(3).repeat_interleave(count)
        centres = torch.eye(3, 4, dtype=torch.float64)[targets]
        return Examples(centres + 0.6 * random.normal(random.key(0, part), (3 * count, 4)).double(), targets)

    def fingerprint(self):
        return f"clouds {self.size}"


def double(build, *sizes, **options):
    return build(*sizes, **options).double()


def make(kind=Reweighting, **options):
    settings = {
        "source": Clouds(),
        "model": functools.partial(double, MLP, hidden=[5]),
        "rule": SGD(lr=0.5),
        "weights_rule": SGD(lr=1.0),
        "imbalance": 10,
        "meta_per_class": 4,
        "hidden": 6,
    }
    made = kind(**(settings | options))
    made.open(test=False)
    return made


def in_double(graph):
    """All levels in float64: weighting networks are built in float32."""
    for problem in graph.problems.values():
        problem.module.double()
    return graph


@pytest.mark.parametrize(
    ("largest", "imbalance", "sizes"),
    [(1000, 100, [1000, 100, 10]), (30, 100, [30, 3, 1]), (7, 1, [7, 7, 7]), (50, 200, [50, 4, 1])],
)
def test_matches_the_exponential_long_tail(largest, imbalance, sizes):
    assert tail_sizes(largest, 3, imbalance) == sizes


def test_parts_are_disjoint_balanced_and_long_tailed():
    made = make(RegularisedReweighting, decay_rule=SGD())
    parts = {name: made.parts[name] for name in (LONG_TAIL, META, SELECTION)}
    assert [parts[name].targets.bincount().tolist() for name in parts] == [[32, 10, 3], [4, 4, 4], [4, 4, 4]]
    rows = torch.cat([part.inputs for part in parts.values()])
    assert len(rows.unique(dim=0)) == len(rows) == len(made.parts[BOTH].targets)
    other = make(RegularisedReweighting, decay_rule=SGD(), data_seed=1)
    assert not torch.equal(other.parts[META].inputs, made.parts[META].inputs)
    assert made.record() != other.record()


def test_matches_a_step_of_meta_weight_net_by_hand():
    made = make()
    graph, key = in_double(made.graph()), random.key(3, "run")
    start = graph.init(key)
    after, _ = graph.step(start, key)
    theta, phi = (dict(start["levels"][name].params) for name in ("classifier", "weights"))
    modules = {name: problem.module for name, problem in graph.problems.items()}
    (inputs, targets), (clean_inputs, clean_targets) = made.parts[LONG_TAIL], made.parts[META]
    theta, phi = ({name: value.clone().requires_grad_() for name, value in params.items()} for params in (theta, phi))
    losses = functional.cross_entropy(functional_call(modules["classifier"], theta, inputs), targets, reduction="none")
    weights = torch.sigmoid(functional_call(modules["weights"], phi, losses.detach()[:, None]))[:, 0]
    grads = torch.autograd.grad((weights * losses).sum() / len(losses), list(theta.values()), create_graph=True)
    moved = {name: value - 0.5 * grad for (name, value), grad in zip(theta.items(), grads, strict=True)}
    meta = functional.cross_entropy(functional_call(modules["classifier"], moved, clean_inputs), clean_targets)
    wanted = torch.autograd.grad(meta, list(phi.values()))
    for (name, value), grad in zip(phi.items(), wanted, strict=True):
        torch.testing.assert_close(after["levels"]["weights"].params[name], (value - grad).detach(), rtol=0, atol=1e-12)
    for name, value in moved.items():
        torch.testing.assert_close(after["levels"]["classifier"].params[name], value.detach(), rtol=0, atol=1e-12)


def test_gradient_of_the_third_level_matches_finite_differences():
    """The decay c moves a step of the weighting network by -lr c phi, that moves a step of the classifier, that its loss."""
    made = make(RegularisedReweighting, decay_rule=SGD(), initial_decay=0.3, weights_rule=SGD(lr=3.0))
    graph, key = in_double(made.graph()), random.key(3, "run")
    start = graph.init(key)["levels"]
    theta, phi = start["classifier"].params, start["weights"].params
    modules = {name: problem.module for name, problem in graph.problems.items()}
    (inputs, targets), (clean_inputs, clean_targets) = made.parts[LONG_TAIL], made.parts[SELECTION]

    def loss(displacement):
        moved = {name: (1 - displacement * 3.0 * 0.3) * value for name, value in phi.items()}
        leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
        losses = functional.cross_entropy(
            functional_call(modules["classifier"], leaves, inputs), targets, reduction="none"
        )
        weights = torch.sigmoid(functional_call(modules["weights"], moved, losses.detach()[:, None]))[:, 0]
        grads = torch.autograd.grad((weights.detach() * losses).mean(), list(leaves.values()))
        after = {name: value - 0.5 * grad for (name, value), grad in zip(theta.items(), grads, strict=True)}
        return functional.cross_entropy(functional_call(modules["classifier"], after, clean_inputs), clean_targets)

    wanted = (loss(1e-4) - loss(-1e-4)) / 2e-4
    (found,) = graph.gradients(graph.init(key), key)["decay"].values()
    assert abs(float(wanted)) > 1e-5
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-6, atol=0)


def test_baselines_match_training_without_weights():
    made = make(batch_size=None)
    key = random.key(0, "evaluate")
    graph = in_double(made.graph())
    state = graph.init(key)
    for _ in range(3):
        state, _ = graph.step(state, key)
    found = made.evaluate(state, key, test=False)
    model = double(MLP, 4, 3, hidden=[5])
    model.load_state_dict(graph.init(key)["levels"]["classifier"].params)
    for part, name in ((LONG_TAIL, "accuracy_plain"), (BOTH, "accuracy_plain_with_clean")):
        fresh = double(MLP, 4, 3, hidden=[5])
        fresh.load_state_dict(model.state_dict())
        optimizer = torch.optim.SGD(fresh.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            functional.cross_entropy(fresh(made.parts[part].inputs), made.parts[part].targets).backward()
            optimizer.step()
        inputs, targets = made.parts["validation"]
        right = (fresh(inputs).argmax(1) == targets).double()
        wanted = sum(float(right[targets == c].mean()) for c in range(3)) / 3
        assert found[name] == pytest.approx(wanted, abs=1e-6)


def test_test_data_are_sealed_until_opened():
    made = make()
    with pytest.raises(ValueError, match=r"part is 'test'; accepted: .*after open\(test=True\)"):
        made.examples("test", "cpu")
    made.open(test=True)
    assert len(made.examples("test", "cpu").targets) == 90


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imbalance": 0.5}, "imbalance is 0.5; accepted: 1 <= imbalance"),
        ({"meta_per_class": 40}, "meta_per_class is 40, and the smallest class has 40 examples"),
        ({"batch_size": 1000}, "batch_size is 1000; accepted: 1 <= batch_size <= "),
    ],
)
def test_refuses_what_cannot_be_drawn(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_improves_on_equal_weights_on_a_long_tail_of_digits():
    """configs/multilevel/reweighting.yaml in fewer steps; five seeds gain 5.2 +- 1.5 points in all of them."""
    made = Reweighting(
        ImageSource(path="digits"),
        functools.partial(MLP, hidden=[64]),
        SGD(lr=0.5, weight_decay=0.003),
        Adam(lr=0.03),
        imbalance=200,
        data_seed=10,
    )
    made.open(test=False)
    graph, key = made.graph(), random.key(10, "run")
    state = graph.init(key)
    for _ in range(150):
        state, _ = graph.step(state, key)
    found = made.evaluate(state, key, test=False)
    assert found["weight_tail"] > 5 * found["weight_head"]
    assert found["accuracy"] > found["accuracy_plain"] + 0.02
