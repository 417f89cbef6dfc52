import dataclasses
import json
import math

import pytest
import torch
from torch.nn import functional

from metalearn import random
from metalearn.losses import operators
from metalearn.losses.learned import LearnedLoss, load_loss
from metalearn.losses.program import Program
from metalearn.losses.taylor import TaylorLoss
from metalearn.search.candidates import Candidate, Scored, gradients_of
from metalearn.search.gradients import SymbolicGradients

KEY = random.key(0)
COEFFICIENTS = (0.25, 0.625, -1.125, 0.75, 1.5, -0.375, 1.25, 0.875)  # exact in float32, a sixth of the fifth too
ONE = Program.parse("mul(-1,mul(y,log(p)))")
OTHER = Program.parse("div(sub(tanh(p),y),max(p,sqrt(y)))")
EDGES = (1.0, -0.5, 1.5, 0.75, 2.0)


def mixed(output):
    """Candidates and finished losses of every kind, in no order."""
    weight = {"softmax": [0.5, 2.0, 0.0, 1.5], "sigmoid": [3.0]}[output]
    return [
        LearnedLoss(OTHER, output=output, weight=weight),
        Candidate(ONE, EDGES),
        load_loss("focal", output=output),
        Candidate(None, COEFFICIENTS),
        LearnedLoss(ONE, EDGES, output=output),
        load_loss("mse", output=output, weight=weight),
        Candidate(OTHER),
        LearnedLoss(ONE, EDGES, output=output, weight=weight, reduction="sum"),
        TaylorLoss(COEFFICIENTS, output=output),
        LearnedLoss(OTHER, output="identity"),  # its own output counts
    ]


@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
def test_gradients_match_autograd_of_the_mean_of_each_loss_in_order(output):
    losses = mixed(output)
    num_outputs = {"softmax": 4, "sigmoid": 1}[output]
    z_PNK = 2 * random.normal(random.fold(KEY, "z"), (len(losses), 12, num_outputs)).double()
    index_N = torch.arange(12) % 4
    target_NK = functional.one_hot(index_N).double() if output == "softmax" else (index_N % 2).double().unsqueeze(1)
    wanted = []
    for loss, z_NK in zip(losses, z_PNK, strict=True):
        criterion = (loss.loss(output) if isinstance(loss, Candidate) else loss).double()
        leaf = z_NK.clone().requires_grad_()
        wanted += torch.autograd.grad(criterion.per_example(leaf, target_NK).mean(), leaf)
    gradients = gradients_of(losses, output)
    assert gradients.count == len(losses)
    found = gradients.gradient(z_PNK, target_NK)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-10, atol=1e-12)
    chosen = [7, 1, 0]
    found = gradients.select(chosen).gradient(z_PNK[chosen], target_NK)
    torch.testing.assert_close(found, torch.stack(wanted)[chosen], rtol=1e-10, atol=1e-12)


def test_gradient_matches_that_of_the_weighted_criterion_on_class_indices():
    weight = [0.5, 2.0, 0.1, 1.5]
    loss = LearnedLoss(ONE, weight=weight)
    z_NK, index_N = random.normal(random.fold(KEY, "z"), (8, 4)).double(), torch.arange(8) % 4
    leaf = z_NK.clone().requires_grad_()
    mean = functional.cross_entropy(leaf, index_N, torch.tensor(weight).double(), reduction="sum") / 8
    found = gradients_of([loss], "softmax").gradient(z_NK.unsqueeze(0), functional.one_hot(index_N).double())
    torch.testing.assert_close(found[0], torch.autograd.grad(mean, leaf)[0], rtol=1e-6, atol=1e-8)


def test_programs_without_weights_of_classes_go_without_autograd():
    losses = [Candidate(ONE, EDGES), LearnedLoss(ONE), Candidate(OTHER)]
    assert isinstance(gradients_of(losses, "softmax"), SymbolicGradients)


SCORED = [
    Scored(
        Candidate(ONE, EDGES), tuned=(1.0, 0.1, 1e-300, -2.5, 1 / 3), errors=(0.25, 0.1 + 0.2), like="0123456789abcdef"
    ),
    Scored(Candidate(OTHER), errors=(0.5,)),
    Scored(Candidate(ONE), verdict="dead"),
    Scored(Candidate(None, COEFFICIENTS), errors=(0.75, 0.5)),
]


@pytest.mark.parametrize("scored", SCORED, ids=lambda scored: scored.verdict)
def test_builtins_round_trip(scored: Scored):
    saved = scored.to_builtins()
    assert Scored.from_builtins(saved) == Scored.from_builtins(json.loads(json.dumps(saved))) == scored
    assert Scored.from_builtins(saved).like == scored.like


def test_error_family_and_best_of_what_is_scored():
    tuned, plain, dead, polynomial = SCORED
    assert polynomial.error == 0.625 and dead.error == math.inf
    assert tuned.best == Candidate(ONE, tuned.tuned) and plain.best == plain.candidate
    assert tuned.family == tuned.like and plain.family == plain.candidate.canonical.name
    turned = Scored(Candidate(Program.parse("mul(mul(log(p),y),-1)")))
    assert turned.family == dead.family != turned.candidate.name
    assert Scored(Candidate(OTHER), like=dead.family).family == dead.family


def test_canonical_candidate_is_the_same_loss_and_equal_ones_share_a_name():
    turned = Candidate(Program.parse("mul(mul(log(p),y),-1)"), (-0.5 * 3, 0.8 * 2, 2.0, 1.5, 1 / 3))
    z_NK = random.normal(random.fold(KEY, "z"), (6, 3)).double()
    target_NK = functional.one_hot(torch.arange(6) % 3).double()
    values = [one.loss("softmax").double().per_example(z_NK, target_NK) for one in (turned, turned.canonical)]
    torch.testing.assert_close(*values)
    assert turned.canonical == turned.canonical.canonical != turned
    assert turned.canonical.weights == (1 / 3, -1.5, 1.6, 2.0, 1.5)
    assert Candidate(ONE).canonical.name == Candidate(Program.parse("mul(mul(log(p),y),-1)")).canonical.name
    assert Candidate(None, COEFFICIENTS).canonical == Candidate(None, COEFFICIENTS)
    different = [
        turned,
        Candidate(turned.program),
        Candidate(ONE, EDGES),
        Candidate(None, COEFFICIENTS),
        Candidate(None, EDGES),
    ]
    assert len({one.name for one in different}) == len(different)


def test_a_candidate_counts_what_can_be_tuned_and_what_it_takes(monkeypatch: pytest.MonkeyPatch):
    assert [(one.num_weights, one.complexity) for one in (Candidate(ONE), Candidate(None, COEFFICIENTS))] == [
        (5, 7),
        (8, 8),
    ]
    costly = dataclasses.replace(operators.OPERATORS["log"], complexity=9)
    monkeypatch.setitem(operators.OPERATORS, "log", costly)
    assert Candidate(Program(ONE.names)).complexity == 14
    assert (Candidate(ONE).text, Candidate(None, COEFFICIENTS).text) == (str(ONE), "taylor")
