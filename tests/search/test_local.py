import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from metalearn import random
from metalearn.base import Examples, Source
from metalearn.estimators.evolution import PersistentES
from metalearn.estimators.forward import ForwardMode
from metalearn.estimators.unrolled import Unrolled
from metalearn.losses.compiled import compile_gradient
from metalearn.losses.program import Program
from metalearn.models.vision import MLP, LeNet
from metalearn.optim.first_order import SGD, Adam
from metalearn.problems.learned_loss import LossTask
from metalearn.search.candidates import Candidate
from metalearn.search.local import Episode, LocalSearch, one_step_gradients

CROSS_ENTROPY = "mul(-1,mul(y,log(p)))"
TEXTS = [
    CROSS_ENTROPY,
    "square(sub(y,p))",
    "sub(tanh(mul(p,p)),div(y,sqrt(p)))",
    "max(mul(y,p),sub(abs(sub(p,y)),min(y,square(p))))",
    "mul(sub(p,p),y)",
]
KEY = random.key(7)


class Draws(Source):
    """Normal inputs of 16 features, with labels, or two numbers each, that depend on the first of them."""

    def __init__(self, num_classes=3, regression=False):
        self.num_classes, self.regression = num_classes, regression

    def read(self, part):
        inputs = random.normal(random.key(0, part), (40, 16))
        if self.regression:
            return Examples(inputs, torch.stack([inputs[:, 0], inputs[:, 1] * inputs[:, 2]], 1))
        return Examples(inputs, inputs[:, : self.num_classes].argmax(1))

    def fingerprint(self):
        return "draws"


def mlp(num_inputs, num_outputs):
    return MLP(num_inputs, num_outputs, (6,)).double()


def lenet(num_inputs, num_outputs):
    return LeNet(num_inputs, num_outputs, (2, 3), (5, 4)).double()


def with_dropout(num_inputs, num_outputs):
    return nn.Sequential(nn.Linear(num_inputs, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, num_outputs)).double()


def opened(model=mlp, rule=None, output="softmax", **options):
    source = Draws(2 if output != "softmax" else 3, output == "identity")
    task = LossTask(
        source, model, rule or SGD(0.1), batch_size=16, outer_batch_size=12, sigmoid=output == "sigmoid", **options
    )
    task.open(test=False)
    return task


def candidates():
    return [Candidate(Program.parse(text)) for text in TEXTS]


def meta_gradient(task, program, weights, rule, key, steps=1):
    """Autograd through the inner steps, written out."""
    episode = random.fold(key, "episode")
    batches, params = task.batches(key, steps), task.initial(episode)[0]
    params = {name: value.requires_grad_() for name, value in params.items()}
    state, criterion = rule.init({}, params), Candidate(program).loss(task.output)
    for k in range(steps):
        inputs, targets = batches.inner(k)
        loss = functional_call(criterion, {"weights": weights}, (functional_call(task.module, params, inputs), targets))
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True, materialize_grads=True)
        params, state = rule.update({}, dict(zip(params, grads, strict=True)), state, params)
    outer = task.objective(functional_call(task.module, params, batches.outer.inputs), batches.outer.targets)
    return torch.autograd.grad(outer, weights, materialize_grads=True)[0]


def tuned_alone(task, candidate, start, steps, rule, inner_steps=1, lr=1e-3):
    """Local search by ``torch.optim.Adam``, for one candidate."""
    weights = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr)
    for step in range(steps):
        key = random.fold(random.fold(KEY, "steps"), step)
        weights.grad = meta_gradient(task, candidate.program, weights, rule, key, inner_steps)
        optimizer.step()
    return weights.detach()


def starts(task, found):
    return LocalSearch(steps=0).tune(task, found, KEY)


RULES = {
    "descent": SGD(0.1),
    "momentum": SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": Adam(0.01, eps=0.1),
}
CASES = [
    (mlp, "softmax", "descent"),
    (mlp, "softmax", "momentum"),
    (mlp, "softmax", "adam"),
    (lenet, "softmax", "descent"),
    (mlp, "sigmoid", "descent"),
    (mlp, "identity", "descent"),
    (lenet, "identity", "momentum"),
]


@pytest.mark.parametrize(("model", "output", "rule"), CASES)
def test_matches_backpropagation_through_the_step(model, output, rule):
    task, found = opened(model, RULES[rule], output), candidates()
    weights = [1 + 0.2 * random.normal(random.key(1, one.name), (one.program.num_weights,)).double() for one in found]
    slopes = [compile_gradient(one.program) for one in found]
    grads = one_step_gradients(Episode(task, None, 1), slopes, weights, KEY)
    for one, own, grad in zip(found, weights, grads, strict=True):
        expected = meta_gradient(task, one.program, own.requires_grad_(), RULES[rule], KEY)
        assert expected.abs().max() > 1e-5
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize("chunk", [2, 64])
def test_matches_a_loop_over_candidates_with_the_adam_of_torch(chunk):
    task, found = opened(), candidates()
    tuned = LocalSearch(steps=10, inner_lr=0.3, chunk=chunk).tune(task, found, KEY)
    for one, start, weights in zip(found, starts(task, found), tuned, strict=True):
        expected = tuned_alone(task, one, start, 10, SGD(0.3))
        assert max(abs(a - b) for a, b in zip(start, weights, strict=True)) > 1e-3
        torch.testing.assert_close(torch.tensor(weights, dtype=torch.float64), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("estimator", [None, ForwardMode(), Unrolled("graph")])
@pytest.mark.parametrize("inner_steps", [1, 3, 5])
def test_estimators_match_backpropagation_through_several_steps(inner_steps, estimator):
    task, found = opened(), candidates()[1:3]
    search = LocalSearch(steps=2, inner_steps=inner_steps, inner_lr=0.3, lr=0.01, estimator=estimator)
    for one, start, weights in zip(found, starts(task, found), search.tune(task, found, KEY), strict=True):
        expected = tuned_alone(task, one, start, 2, SGD(0.3), inner_steps, 0.01)
        torch.testing.assert_close(torch.tensor(weights, dtype=torch.float64), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("model", [mlp, with_dropout])
def test_the_product_matches_an_estimator_from_partly_trained_models(model):
    task, found = opened(model, SGD(0.1, momentum=0.9)), candidates()[:3]
    settings = dict(steps=4, start_steps=6, lr=0.01)
    for inner_lr in (None, 0.3):
        together = LocalSearch(inner_lr=inner_lr, **settings).tune(task, found, KEY)
        alone = LocalSearch(inner_lr=inner_lr, estimator=Unrolled("graph"), **settings).tune(task, found, KEY)
        fresh = LocalSearch(inner_lr=inner_lr, steps=4, lr=0.01).tune(task, found, KEY)
        for left, right, other in zip(together, alone, fresh, strict=True):
            assert left == pytest.approx(right, abs=1e-8) and left != pytest.approx(other, abs=1e-5)


def test_partly_trained_models_have_taken_a_drawn_number_of_steps():
    task = opened()
    window, losses = Episode(task, SGD(0.1), 1, start_steps=40), []
    inputs, targets = task.examples("train", "cpu")
    for draw in range(12):
        state = window.init({}, random.key(draw))
        assert int(state.step) == 0 and state.rule == {}
        losses.append(float(task.objective(task.predict(state, inputs), targets)))
        fresh = task.init({}, random.key(draw))
        assert losses[-1] <= float(task.objective(task.predict(fresh, inputs), targets)) + 1e-12
    assert min(losses) < 0.6 * max(losses)


def test_equal_candidates_come_to_equal_weights_in_any_company():
    task = opened()
    left, right = (Candidate(Program.parse(text)) for text in ("add(p,mul(y,tanh(p)))", "add(mul(tanh(p),y),p)"))
    search = LocalSearch(steps=5, inner_lr=0.3)
    first, second = search.tune(task, [left, right], KEY)
    assert Candidate(left.program, first).canonical == Candidate(right.program, second).canonical
    others = search.tune(task, [*candidates(), right], KEY)
    assert others[-1] == pytest.approx(second, abs=1e-12)
    own = Candidate(left.program, (2.0, 0.5, 1.0, 1.0, -1.0))
    assert LocalSearch(steps=0).tune(task, [own], KEY) == [own.weights]


def test_one_that_breaks_keeps_its_weights_and_touches_no_other():
    task, found = opened(), candidates()[:2]
    broken = Candidate(Program.parse("square(square(mul(y,p)))"), (1e200, 1.0, 1.0, 1.0))
    for search in (LocalSearch(steps=3, inner_lr=0.3), LocalSearch(steps=3, inner_lr=0.3, estimator=Unrolled())):
        ran = search.run(task, [found[0], broken, found[1]], KEY)
        assert [one.finite for one in ran] == [True, False, True]
        assert ran[1].weights == broken.weights
        assert [ran[0].weights, ran[2].weights] == [pytest.approx(one) for one in search.tune(task, found, KEY)]


def test_goes_on_from_window_to_window_with_persistent_evolution():
    """Two windows of an episode: the first, whose objective is 0, leaves the weights alone; the second sees both."""
    task, one = opened(), Candidate(Program.parse(CROSS_ENTROPY))
    estimator = PersistentES(pairs=512, std=0.02)
    search = LocalSearch(steps=2, inner_steps=2, horizon=4, inner_lr=0.3, lr=0.1, estimator=estimator)
    (start,), (after,) = starts(task, [one]), search.tune(task, [one], KEY)
    exact = LocalSearch(steps=1, inner_steps=4, inner_lr=0.3, lr=0.1).tune(task, [one], KEY)[0]
    moves, expected = ([b - a for a, b in zip(start, end, strict=True)] for end in (after, exact))
    assert all(a * b > 0 for a, b in zip(moves, expected, strict=True))


def test_decreases_the_objective_after_a_step():
    """Cross-entropy at too small a rate: its weights grow, and with them the step."""
    task, one = opened(), Candidate(Program.parse(CROSS_ENTROPY))
    weights = LocalSearch(steps=60, lr=0.03, inner_lr=0.1).tune(task, [one], KEY)[0]

    def objective(given):
        losses = []
        for draw in range(8):
            key = random.key(100 + draw)
            problem = task.with_loss(one._replace(weights=given).loss("softmax"))
            batches, state = problem.batches(key, 1), problem.init({}, key)
            state = problem.step({}, state, batches.inner(0), key)[0]
            losses.append(float(problem.outer({}, state, batches.outer)))
        return sum(losses) / len(losses)

    assert objective(weights) < objective((1.0,) * 5) - 0.02
    assert math.prod(weights) > 1.5


def test_refusals_name_what_is_accepted():
    task = opened()
    with pytest.raises(ValueError, match="horizon is 3; accepted: a multiple of inner_steps, 2"):
        LocalSearch(inner_steps=2, horizon=3)
    with pytest.raises(ValueError, match="candidates has a 'taylor'; accepted: programs"):
        LocalSearch(steps=1).tune(task, [Candidate(None, (0.0,) * 8)], KEY)
    dead = Candidate(Program.parse("sign(sub(y,p))"))
    assert LocalSearch(steps=2).tune(task, [dead], KEY) == starts(task, [dead])
