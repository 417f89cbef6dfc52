import functools
import hashlib
import math
import time

import pytest
import torch
from problems.conftest import opened
from torch import nn

from metalearn import random
from metalearn.base import Examples, Source
from metalearn.losses.learned import LearnedLoss
from metalearn.losses.program import Program
from metalearn.losses.standard import CrossEntropy
from metalearn.models.vision import MLP, LeNet
from metalearn.optim.first_order import SGD, Adam, Clipped
from metalearn.problems.learned_loss import LossTask
from metalearn.search.gradients import MixedGradients, ModuleGradients, SymbolicGradients
from metalearn.search.halving import Halving, survivors
from metalearn.search.population import PopulationTraining, rows
from metalearn.tasks.sources import ImageSource

TEXTS = (
    "mul(-1,mul(y,log(p)))",
    "square(sub(y,p))",
    "abs(sub(y,p))",
    "div(sub(tanh(p),y),max(p,sqrt(y)))",
    "sqrt(abs(sub(y,p)))",
    "square(sign(y))",  # dead
    "log(add(sub(y,p),add(1,1)))",
    "tanh(mul(-1,mul(y,p)))",
)
PROGRAMS = [Program.parse(text) for text in TEXTS]
NESTEROV = SGD(0.05, 0.9, True, 5e-4)
KEY = random.key(1)


class Numbers(Source):
    """A column of numbers to predict, or with two classes its sign."""

    num_classes = 1

    def __init__(self, regression=True):
        self.regression, self.num_classes = regression, 1 if regression else 2

    def read(self, part):
        inputs = random.normal(random.key(0, part), (200, 4))
        numbers = inputs[:, 0] * 2 - inputs[:, 1] + 0.3 * random.normal(random.key(1, part), (200,))
        return Examples(inputs, numbers if self.regression else (numbers > 0).long())

    def fingerprint(self):
        return hashlib.sha256(repr(self.regression).encode()).hexdigest()


class GroupNormNet(nn.Sequential):
    """A small convolutional network with a normalisation of each example."""

    def __init__(self, num_inputs, num_outputs, norm=nn.GroupNorm):
        side = math.isqrt(num_inputs)
        normalisation = nn.GroupNorm(2, 4) if norm is nn.GroupNorm else nn.BatchNorm2d(4)
        convolution = nn.Sequential(nn.Unflatten(-1, (1, side, side)), nn.Conv2d(1, 4, 3, padding=1), normalisation)
        super().__init__(*convolution, nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(-3), nn.Linear(side**2, num_outputs))


class Counting(nn.Sequential):
    """A batch norm that averages over all batches: its momentum is a count."""

    def __init__(self, num_inputs, num_outputs):
        super().__init__(nn.BatchNorm1d(num_inputs, momentum=None), nn.Linear(num_inputs, num_outputs))


@functools.cache
def digits():
    return ImageSource("digits", validation=0.3)


def task_of(model, rule=NESTEROV, source=None, dtype=torch.float64, batch_size=32, **options):
    return opened(
        LossTask(
            source or digits(),
            lambda *sizes: model(*sizes).to(dtype),
            rule,
            batch_size=batch_size,
            outer_batch_size=50,
            **options,
        )
    )


def symbolic(programs=PROGRAMS, output="softmax"):
    return SymbolicGradients(programs, [torch.zeros(0)] * len(programs), output)


def by_loop(task, losses, key, steps, optimizers):
    """Each candidate alone: module, criterion and ``torch.optim`` (errors on validation, parameters)."""
    start, buffers = task.initial(random.fold(key, "init"))
    errors, found = [], []
    for loss, optimizer in zip(losses, optimizers, strict=True):
        module = task.module
        module.load_state_dict(start | buffers)
        stepper = optimizer(module.parameters())
        for step in range(steps):
            inputs, targets = task.inner_batch(random.fold(key, "batch", step))
            total = loss(module(inputs), targets if task.output == "softmax" else task.target_matrix(targets))
            if total.requires_grad:
                stepper.zero_grad()
                total.backward()
            else:
                for p in module.parameters():
                    p.grad = torch.zeros_like(p)
            stepper.step()
        validation = task.examples("validation", "cpu")
        with torch.no_grad():
            errors.append(task.error(module.eval()(validation.inputs), validation.targets))
        module.train()
        found.append({name: p.detach().clone() for name, p in module.state_dict().items()})
    return torch.stack(errors), found


def nesterov(lr=0.05):
    return functools.partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


def assert_equal_runs(trained, expected, rtol=1e-9, atol=1e-9):
    for row, state in enumerate(expected):
        for name, value in state.items():
            own = trained.params.get(name, trained.buffers.get(name))
            torch.testing.assert_close(
                own[row], value, rtol=rtol, atol=atol, msg=lambda m, r=row, n=name: f"{r} {n} {m}"
            )


MODELS = {
    "mlp": (functools.partial(MLP, hidden=(16,)), "stacked", 120),
    "deep": (functools.partial(MLP, hidden=(12, 8), activation="relu"), "stacked", 60),
    "gelu": (functools.partial(MLP, hidden=(12, 8), activation="gelu"), "stacked", 60),
    "linear": (functools.partial(MLP, hidden=()), "stacked", 60),
    "vmap": (functools.partial(MLP, hidden=(16,)), "vmap", 120),
    "lenet": (functools.partial(LeNet, channels=(2, 3), widths=(8, 6)), "auto", 100),
    "groups": (GroupNormNet, "auto", 40),
    "batches": (functools.partial(GroupNormNet, norm=nn.BatchNorm2d), "auto", 40),
}


@pytest.mark.parametrize("name", MODELS)
def test_matches_a_loop_over_candidates(name):
    model, path, steps = MODELS[name]
    programs = PROGRAMS if name in ("mlp", "lenet") else PROGRAMS[:4]
    task, training = task_of(model), PopulationTraining(steps, path=path)
    trained = training.train(task, symbolic(programs), KEY)
    losses = [LearnedLoss(program).double() for program in programs]
    errors, expected = by_loop(task, losses, KEY, steps, [nesterov()] * len(losses))
    assert_equal_runs(trained, expected)
    torch.testing.assert_close(training.errors(task, trained, "validation", chunk=300), errors, rtol=0, atol=1e-12)
    assert trained.finite_P.all() and (trained.steps_P == steps).all()
    assert errors[0] < 0.7  # it learns: chance is 0.9


@pytest.mark.parametrize("path", ["stacked", "vmap"])
def test_matches_the_errors_of_a_loop_in_float32(path):
    task, training = (
        task_of(functools.partial(MLP, hidden=(32,)), dtype=torch.float32),
        PopulationTraining(100, path=path),
    )
    errors, _ = by_loop(task, [LearnedLoss(one) for one in PROGRAMS], KEY, 100, [nesterov()] * len(PROGRAMS))
    found = training.errors(task, training.train(task, symbolic(), KEY), "validation")
    assert torch.equal(found.float(), errors)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_matches_a_loop_in_regression_and_with_one_sigmoid_output(sigmoid):
    output = "sigmoid" if sigmoid else "identity"
    task = task_of(functools.partial(MLP, hidden=(6,)), source=Numbers(not sigmoid), sigmoid=sigmoid)
    programs, training = [PROGRAMS[1], PROGRAMS[2], PROGRAMS[3]], PopulationTraining(100)
    trained = training.train(task, symbolic(programs, output), KEY)
    losses = [LearnedLoss(program, output=output).double() for program in programs]
    errors, expected = by_loop(task, losses, KEY, 100, [nesterov()] * 3)
    assert_equal_runs(trained, expected)
    torch.testing.assert_close(training.errors(task, trained, "validation"), errors, rtol=1e-9, atol=0)
    assert errors[0] < 0.2


RULES = {
    "sgd": (NESTEROV, lambda lr: nesterov(lr)),
    "adam": (Adam(), lambda lr: functools.partial(torch.optim.Adam, lr=lr)),
}


@pytest.mark.parametrize("rule", RULES)
def test_matches_a_loop_with_each_candidates_own_learning_rate(rule):
    rates, programs = torch.tensor([0.001, 0.02, 0.1, 0.01], dtype=torch.float64), PROGRAMS[:4]
    task = task_of(functools.partial(MLP, hidden=(8,)), RULES[rule][0])
    trained = PopulationTraining(60, halving=None).train(task, symbolic(programs), KEY, rates)
    optimizers = [RULES[rule][1](float(rate)) for rate in rates]
    _, expected = by_loop(task, [LearnedLoss(one).double() for one in programs], KEY, 60, optimizers)
    assert_equal_runs(trained, expected)


def test_rules_that_look_at_a_whole_run_look_at_one_row():
    """A norm of gradients is each candidate's own; the same for a rule around a rule, with rates."""
    task = task_of(functools.partial(MLP, hidden=(8,)), Clipped(Adam(0.01), 0.1))
    rates = torch.tensor([0.01, 0.03, 0.02], dtype=torch.float64)
    whole = PopulationTraining(30).train(task, symbolic(PROGRAMS[:3]), KEY, rates)
    for row in range(3):
        alone = task_of(functools.partial(MLP, hidden=(8,)), Clipped(Adam(float(rates[row])), 0.1))
        one = PopulationTraining(30, path="vmap").train(alone, symbolic(PROGRAMS[row : row + 1]), KEY)
        assert_equal_runs(rows(whole, [row]), [{name: value[0] for name, value in one.params.items()}])


def test_mixed_losses_match_each_kind_alone():
    task, training = task_of(functools.partial(MLP, hidden=(8,))), PopulationTraining(40)
    own = [LearnedLoss(PROGRAMS[1]).double(), CrossEntropy()]
    mixed = training.train(task, MixedGradients([symbolic(PROGRAMS[:2]), ModuleGradients(own)]), KEY)
    assert_equal_runs(rows(mixed, [1, 0]), [{n: v[row] for n, v in mixed.params.items()} for row in (2, 3)], atol=1e-7)


@pytest.mark.parametrize("path", ["stacked", "vmap"])
@pytest.mark.parametrize("mode", ["exact", "tabulated"])
def test_rows_do_not_depend_on_the_others_bit_by_bit(path, mode):
    task = task_of(functools.partial(MLP, hidden=(32,)), dtype=torch.float32)
    training = PopulationTraining(20, mode, path=path)
    twice = training.train(task, symbolic(PROGRAMS[::-1] + PROGRAMS), KEY)
    once = training.train(task, symbolic(), KEY)
    for name, value in once.params.items():
        assert torch.equal(twice.params[name][len(PROGRAMS) :], value)


@pytest.mark.parametrize("path", ["stacked", "vmap"])
def test_a_run_that_overflows_is_dropped_and_touches_no_other(path):
    task = task_of(functools.partial(MLP, hidden=(6,)), source=Numbers(), dtype=torch.float32)
    wild = Program.parse("square(square(square(sub(y,p))))")
    calm, training = [PROGRAMS[1], PROGRAMS[2]], PopulationTraining(40, path=path)
    trained = training.train(task, symbolic([calm[0], wild, calm[1]], "identity"), KEY, torch.tensor([0.01, 1.0, 0.01]))
    alone = training.train(task, symbolic(calm, "identity"), KEY, torch.tensor([0.01, 0.01]))
    assert trained.finite_P.tolist() == [True, False, True] and trained.steps_P.tolist() == [40, 40, 40]
    for name, value in alone.params.items():
        assert torch.equal(trained.params[name][[0, 2]], value)
    errors = training.errors(task, trained, "validation")
    assert errors[1] == math.inf and torch.equal(errors[[0, 2]], training.errors(task, alone, "validation"))


@pytest.mark.parametrize("rule", [NESTEROV, Clipped(Adam(0.01), 1.0)])
def test_halving_stops_the_worse_and_leaves_the_others_as_they_were(rule):
    task = task_of(functools.partial(MLP, hidden=(8,)), rule)
    rates, halving = torch.linspace(0.01, 0.05, 8, dtype=torch.float64), Halving((20, 40), 0.5)
    halved = PopulationTraining(60, halving=halving).train(task, symbolic(), KEY, rates)
    scores = {}
    for steps in (20, 40, 60):
        plain = PopulationTraining(steps)
        full = plain.train(task, symbolic(), KEY, rates)
        scores[steps] = plain.errors(task, full, "validation")
        stopped = (halved.steps_P == steps).nonzero().flatten()
        assert_equal_runs(
            rows(halved, stopped), [{n: v[row] for n, v in full.params.items()} for row in stopped], rtol=0, atol=1e-13
        )
    first = survivors(scores[20], 0.5)
    second = first[survivors(scores[40][first], 0.5)]
    assert sorted(halved.steps_P.tolist()) == [20] * 4 + [40] * 2 + [60] * 2
    assert (halved.steps_P == 60).nonzero().flatten().tolist() == second.tolist()


def test_halving_asks_who_survives_even_where_no_row_is_left():
    task, asked = task_of(functools.partial(MLP, hidden=(4,))), []

    def choose(scores_P, share):
        asked.append((scores_P.isfinite().sum().item(), share))
        return torch.tensor([], dtype=torch.int64)

    training = PopulationTraining(12, halving=Halving((3, 6, 9), 0.5, examples=30))
    trained = training.train(task, symbolic(PROGRAMS[:3]), KEY, choose=choose)
    assert asked == [(3, 0.5), (0, 0.25), (0, 0.125)]
    assert trained.finite_P.all() and trained.steps_P.tolist() == [3, 3, 3]


def test_tables_give_nearly_the_errors_of_exact_gradients():
    task = task_of(functools.partial(MLP, hidden=(32,)), dtype=torch.float32, batch_size=128)
    errors = []
    for mode in ("exact", "tabulated"):
        training = PopulationTraining(100, mode)
        errors.append(training.errors(task, training.train(task, symbolic(), KEY), "validation"))
    assert (errors[0] - errors[1]).abs().max() <= 0.02
    assert errors[0].max() - errors[0].min() > 0.1


def weighted_family(count):
    """Losses that learn at different speeds: weights of the edges drawn far from 1."""
    programs = [PROGRAMS[i % 5] for i in range(count)]
    drawn = [random.normal(random.key(5, i), (one.num_weights,)).mul(0.8).exp() for i, one in enumerate(programs)]
    return SymbolicGradients(programs, drawn, "softmax")


@pytest.mark.parametrize("path", ["stacked", "vmap"])
def test_ranking_in_bfloat16_agrees_with_float32(path):
    task = task_of(functools.partial(MLP, hidden=(16,)), SGD(0.05), dtype=torch.float32)
    training, gradients = PopulationTraining(30, path=path), weighted_family(64)
    trained = training.train(task, gradients, KEY)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = training.train(task, gradients, KEY)
    assert all(value.dtype == torch.float32 for value in mixed.params.values())
    assert not torch.equal(mixed.params["0.weight"], trained.params["0.weight"])
    errors = torch.stack([training.errors(task, one, "validation") for one in (trained, mixed)])
    ranks = torch.stack(
        [(row[:, None] > row).double().sum(1) + (row[:, None] == row).double().sum(1) / 2 for row in errors]
    )
    assert torch.corrcoef(ranks)[0, 1] > 0.9


def test_is_faster_than_a_loop():
    """Far below what a quiet machine shows (3.1 exact, 5.4 tabulated, 32 candidates), so that a busy one does not fail."""
    task = task_of(functools.partial(MLP, hidden=(32,)), dtype=torch.float32, batch_size=64)
    programs = [PROGRAMS[i % 5] for i in range(32)]
    gradients, training = symbolic(programs), PopulationTraining(20, "tabulated")
    losses, seconds = [LearnedLoss(one) for one in programs], {}
    runs = {
        "loop": lambda: by_loop(task, losses, KEY, 20, [nesterov()] * 32),
        "population": lambda: training.train(task, gradients, KEY),
    }
    for run in (*runs, *runs):  # the second time is warm
        start = time.process_time()
        runs[run]()
        seconds[run] = time.process_time() - start
    assert seconds["population"] < seconds["loop"] / 2


def test_starts_where_it_is_told():
    task = task_of(functools.partial(MLP, hidden=(4,)))
    start = task.initial(random.key(7))
    trained = PopulationTraining(1).train(task, symbolic(PROGRAMS[5:6]), KEY, torch.zeros(1), start=start)
    assert all(torch.equal(trained.params[name][0], value) for name, value in start[0].items())


def test_refuses_what_it_cannot_batch():
    with pytest.raises(ValueError, match="draws random numbers"):
        PopulationTraining(1).train(task_of(functools.partial(MLP, dropout=0.5)), symbolic(), KEY)
    with pytest.raises(ValueError, match="or GroupNorm"):
        PopulationTraining(1).train(task_of(Counting), symbolic(), KEY)
    with pytest.raises(ValueError, match="path is 'stacked' with a LeNet"):
        PopulationTraining(1, path="stacked").train(task_of(LeNet), symbolic(), KEY)
    with pytest.raises(ValueError, match="accepted in regression: 'exact'"):
        task = task_of(MLP, source=Numbers())
        PopulationTraining(1, "tabulated").train(task, symbolic(output="identity"), KEY)
    with pytest.raises(ValueError, match=r"rates_P has shape \(2,\); accepted: \(8,\)"):
        PopulationTraining(1).train(task_of(MLP), symbolic(), KEY, torch.ones(2))
    with pytest.raises(ValueError, match="rungs below steps"):
        PopulationTraining(50, halving=Halving((50,)))
