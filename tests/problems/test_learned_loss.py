import functools

import pytest
import torch
from problems.conftest import PARTS, Clusters, assert_matches_central_differences, double, opened
from torch.nn import functional

from metalearn import random, tree
from metalearn.base import Examples, Source
from metalearn.estimators.evolution import PersistentES
from metalearn.estimators.forward import ForwardGradient, ForwardMode
from metalearn.estimators.implicit import ConjugateGradient
from metalearn.estimators.unrolled import MODES, Unrolled
from metalearn.losses.learned import LearnedLoss
from metalearn.losses.standard import CrossEntropy, MeanSquaredError
from metalearn.models.vision import MLP, SmallResNet
from metalearn.optim.first_order import SGD, Adam
from metalearn.problems.learned_loss import UNTOUCHED, LossTask
from metalearn.tasks.synthetic import HeavyTailedRegression
from metalearn.unroll import Tasks, unroll

CROSS_ENTROPY, SQUARED, ABSOLUTE = "mul(-1,mul(y,log(p)))", "square(sub(y,p))", "abs(sub(y,p))"
ALL = dict(batch_size=None, outer_batch_size=None)


class Line(Source):
    """Numbers that are nearly linear in the inputs, far from zero, and of another spread in every part."""

    num_classes = 1

    def __init__(self):
        self.opened = []

    def read(self, part):
        self.opened.append(part)
        key = random.key(PARTS.index(part))
        inputs = random.normal(random.fold(key, "x"), (30, 4))
        noise = random.normal(random.fold(key, "noise"), (30,))
        return Examples(inputs, 7 + (1 + PARTS.index(part)) * (inputs.sum(1) + 0.3 * noise))

    def fingerprint(self):
        return "line"


def task(source=None, model=double, rule=None, loss=CROSS_ENTROPY, **options):
    options = dict(horizon=6, batch_size=10, outer_batch_size=12, init_seed=0) | options
    return opened(LossTask(source or Clusters(), model, rule or SGD(0.3, momentum=0.9), loss, **options))


def two_classes(**options):
    return task(Clusters(num_classes=2), sigmoid=True, **options)


def off_centre(problem):
    """Parameters of a loss that is no known one."""
    return {
        n: 1 + 0.3 * random.normal(random.key(4, n), tuple(v.shape)).to(v)
        for n, v in problem.init_meta(random.key(0)).items()
    }


def gradient(estimator, problem, meta, steps):
    key = random.key(3)
    return estimator.estimate(problem, meta, estimator.init(problem, meta, key), problem.batches(key, steps), key)


# -- the run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "criterion"),
    [
        (functools.partial(task, loss="cross_entropy"), functional.cross_entropy),
        (task, functional.cross_entropy),
        (two_classes, lambda z, y: functional.binary_cross_entropy_with_logits(z.squeeze(1), y.double())),
        (functools.partial(task, Line(), loss=SQUARED), lambda z, y: functional.mse_loss(z.squeeze(1), y)),
    ],
    ids=["own", "softmax", "sigmoid", "identity"],
)
def test_matches_torch_training(problem, criterion):
    """Known losses as programs, against modules trained by torch.optim under torch's criteria."""
    if criterion is not functional.cross_entropy and problem is two_classes:
        problem = functools.partial(problem, loss="sub(mul(sub(y,1),log(sub(1,p))),mul(y,log(p)))")
    problem = problem(**ALL)
    module = double(problem.parts["train"].inputs.shape[1], problem.num_outputs)
    meta = problem.init_meta(random.key(0))
    module.load_state_dict(problem.init(meta, random.key(0)).params)
    optimizer = torch.optim.SGD(module.parameters(), 0.3, momentum=0.9)
    (x, y), (xv, yv) = problem.examples("train", "cpu"), problem.examples("validation", "cpu")
    for _ in range(6):
        optimizer.zero_grad()
        criterion(module(x), y.double() if y.is_floating_point() else y).backward()
        optimizer.step()
    end = problem.trained(meta, random.key(0), problem.batches(random.key(0), 6)).end
    torch.testing.assert_close(end.params, dict(module.named_parameters()), rtol=1e-6, atol=1e-8)
    wanted = criterion(module(xv), yv.double() if yv.is_floating_point() else yv)
    torch.testing.assert_close(problem.outer(meta, end, Examples(xv, yv)), wanted.detach(), rtol=1e-6, atol=1e-8)


SETTINGS = {
    "softmax": task,
    "sigmoid": functools.partial(two_classes, loss="square(sub(y,p))"),
    "identity": functools.partial(task, Line(), rule=SGD(0.05), loss=SQUARED),
    "adam": functools.partial(task, rule=Adam(0.1), loss=SQUARED),
    "norm": functools.partial(
        task,
        Clusters(num_features=16),
        lambda d, k: SmallResNet(d, k, width=2, groups=2).double(),
        SGD(0.05),
        batch_size=5,
        horizon=2,
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_matches_central_differences(setting):
    problem = SETTINGS[setting]()
    assert_matches_central_differences(problem, off_centre(problem), problem.horizon, rtol=1e-5)


@pytest.mark.parametrize(
    "estimator",
    [*(Unrolled(mode) for mode in MODES), ForwardMode(), ForwardMode(chunk=2)],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("setting", ["softmax", "identity", "norm"])
def test_exact_estimators_agree(estimator, setting):
    problem = SETTINGS[setting]()
    meta = off_centre(problem)
    wanted, found = (gradient(one, problem, meta, problem.horizon) for one in (Unrolled("graph"), estimator))
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-12, atol=0)


def test_random_estimators_point_the_way():
    problem = task()
    meta = off_centre(problem)
    wanted = gradient(Unrolled(), problem, meta, 6).grad["weights"]
    for estimator in (ForwardGradient(200), PersistentES(pairs=200, std=1e-3)):
        found = gradient(estimator, problem, meta, 6).grad["weights"]
        assert functional.cosine_similarity(wanted, found, dim=0) > 0.95


def test_matches_least_squares_differentiated_at_the_solution():
    """Under (a y - b p)^2 the solution is a / b times that of least squares: implicit estimators find its derivative."""
    problem = task(Line(), lambda d, k: MLP(d, k, ()).double(), SGD(0.2), SQUARED, **ALL, horizon=400)
    meta = {"weights": torch.tensor([1.0, 0.8, 1.3], dtype=torch.float64)}  # of sub, y, p
    found = gradient(ConjugateGradient(iterations=20, damping=0.0), problem, meta, 400)
    (x, y), (xv, yv) = problem.examples("train", "cpu"), problem.examples("validation", "cpu")
    solved = torch.linalg.lstsq(torch.cat([x, x.new_ones(len(x), 1)], 1), y.double()).solution
    fitted = xv @ solved[:-1] + solved[-1]
    slope = (2 * (0.8 / 1.3 * fitted - yv) * fitted).mean()
    wanted = torch.stack([torch.zeros(()).double(), slope / 1.3, -slope * 0.8 / 1.3**2])
    torch.testing.assert_close(found.grad["weights"], wanted, rtol=1e-6, atol=1e-8)


def test_runs_of_a_batch_of_tasks_are_each_their_own():
    problem = task(init_seed=None)
    several, key, meta = Tasks(problem, 3), random.key(5), off_centre(problem)
    batches = several.batches(key, 6)
    together = unroll(several, meta, several.init(meta, key), batches, key).end
    for t in range(3):
        own = random.fold(key, t)
        alone = unroll(problem, meta, problem.init(meta, own), problem.batches(own, 6), own).end
        torch.testing.assert_close(tree.index(together.params, t), alone.params, rtol=1e-10, atol=1e-12)
    means = torch.stack([problem.outer(meta, tree.index(together, t), tree.index(batches.outer, t)) for t in range(3)])
    torch.testing.assert_close(several.outer(meta, together, batches.outer), means.mean())


# -- data ------------------------------------------------------------------------------------------------------------


def test_the_validation_part_is_divided_once_and_for_all():
    whole = Clusters(num_examples=41).read("validation")
    first, again = task(Clusters(num_examples=41)), task(Clusters(num_examples=41), loss=SQUARED, batch_size=3)
    kept, untouched = first.parts["validation"], first.parts[UNTOUCHED]
    assert len(kept.targets) == 21 and len(untouched.targets) == 20
    for field in range(2):
        assert torch.equal(torch.cat([kept[field], untouched[field]]), whole[field])
        assert torch.equal(untouched[field], again.parts[UNTOUCHED][field])
    assert first.record()["division"] == {"untouched": 0.5}
    assert all(len(task(untouched=share).parts["validation"].targets) == n for share, n in ((0.0, 40), (0.7, 12)))
    assert UNTOUCHED not in task(untouched=0.0).parts


def test_the_meta_objective_never_sees_untouched_examples():
    problem = task(outer_batch_size=None)
    before = gradient(Unrolled(), problem, off_centre(problem), 6)
    problem.parts[UNTOUCHED] = Examples(*(torch.zeros_like(leaf) for leaf in problem.parts[UNTOUCHED]))
    after = gradient(Unrolled(), problem, off_centre(problem), 6)
    assert torch.equal(before.grad["weights"], after.grad["weights"])
    assert len(problem.batches(random.key(0), 1).outer.targets) == 20


def test_targets_are_scaled_by_statistics_of_train_alone():
    source = Line()
    problem = task(source, loss=None)
    assert source.opened == ["train", "validation"]
    problem.open(test=True)
    raw = {part: Line().read(part).targets for part in PARTS}
    mean, deviation = raw["train"].mean(), raw["train"].std(correction=0)
    divided = torch.cat([problem.parts["validation"].targets, problem.parts[UNTOUCHED].targets])
    for found, part in (
        (problem.parts["train"].targets, "train"),
        (divided, "validation"),
        (problem.parts["test"].targets, "test"),
    ):
        torch.testing.assert_close(found, (raw[part] - mean) / deviation)
    assert problem.parts["test"].targets.std() > 2
    unscaled = task(Line(), loss=None, scale_targets=False)
    assert torch.equal(unscaled.parts["train"].targets, raw["train"])


def test_the_test_part_is_sealed_until_asked_for():
    source = Clusters()
    problem = task(source)
    key = random.key(0)
    with pytest.raises(ValueError, match="part is 'test'"):
        problem.evaluate(problem.init_meta(key), key, test=True)
    other = problem.with_loss(CrossEntropy())
    other.open(test=True)
    assert "test" in other.parts and "test" not in problem.parts
    problem.open(test=True)
    assert problem.evaluate(problem.init_meta(key), key, test=True).keys() >= {
        "error_tuned",
        "error_initial",
        "error_own",
    }


# -- objective and error -----------------------------------------------------------------------------------------------


def test_matches_torch_objectives_and_errors_of_stacked_predictions():
    drawn = random.normal(random.key(1), (2, 5, 9, 3)).double()
    classes, numbers = torch.arange(9) % 3, random.normal(random.key(2), (9,)).double()
    softmax, sigmoid, identity = task(), two_classes(loss="mse"), task(Line(), loss="mse")
    cases = [
        (softmax, drawn, classes, functional.cross_entropy, lambda z: (z.argmax(-1) != classes).double().mean()),
        (
            sigmoid,
            drawn[..., :1],
            classes % 2,
            lambda z, y: functional.binary_cross_entropy_with_logits(z.squeeze(-1), y.double()),
            lambda z: ((z.squeeze(-1).sigmoid() > 0.5).long() != classes % 2).double().mean(),
        ),
        (
            identity,
            drawn[..., :1],
            numbers,
            lambda z, y: functional.mse_loss(z.squeeze(-1), y),
            lambda z: functional.mse_loss(z.squeeze(-1), numbers),
        ),
    ]
    for problem, prediction, targets, objective, error in cases:
        each = [prediction[i, j] for i in range(2) for j in range(5)]
        for function, wanted in (
            (problem.objective, [objective(z, targets) for z in each]),
            (problem.error, [error(z) for z in each]),
        ):
            found = function(prediction, targets)
            torch.testing.assert_close(found, torch.stack(wanted).reshape(2, 5), rtol=1e-10, atol=1e-12)


# -- other losses ------------------------------------------------------------------------------------------------------


def test_the_same_task_under_another_loss_shares_data_and_leaves_the_first_alone():
    problem = task()
    loss = problem.loss
    other = problem.with_loss(LearnedLoss(SQUARED))
    assert problem.loss is loss and other.loss is not loss
    assert other.parts["train"].inputs is problem.parts["train"].inputs and other.module is problem.module
    fresh = task(loss=SQUARED)
    key, meta = random.key(0), fresh.init_meta(random.key(0))
    ends = [one.trained(meta, key, one.batches(key, 6)).end.params for one in (other, fresh)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_losses_are_left_as_they_were_and_seen_in_the_precision_of_the_module():
    loss = LearnedLoss(CROSS_ENTROPY, weights=[0.5, 1.0, 1.5, 2.0, 2.5])
    problem = task(loss=loss)
    meta = problem.init_meta(random.key(0))
    assert meta["weights"].dtype == torch.float64 and torch.equal(meta["weights"], loss.weights.double())
    meta["weights"].add_(1)
    gradient(Unrolled(), problem, meta, 6)
    assert torch.equal(loss.weights, LearnedLoss(CROSS_ENTROPY, loss.weights).weights) and loss.weights[0] == 0.5


def test_class_weights_of_a_loss_take_part():
    loss = CrossEntropy(weight=torch.tensor([1.0, 1.0, 0.0]))
    problem = task(loss=loss, horizon=60, batch_size=None)
    inputs, targets = problem.examples("train", "cpu")
    end = problem.trained({}, random.key(0), problem.batches(random.key(0), 60)).end
    assert set(problem.predict(end, inputs).argmax(-1).tolist()) == {0, 1} and set(targets.tolist()) == {0, 1, 2}


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_evaluation_is_the_mean_of_runs_on_untouched_examples():
    problem = task(init_seed=None, evaluation_runs=3, evaluation_steps=20)
    key, meta = random.key(7), {"weights": 2 * problem.init_meta(random.key(0))["weights"]}
    found = problem.evaluate(meta, key, test=False)
    inputs, targets = problem.examples(UNTOUCHED, "cpu")
    for name, given, loss in (
        ("tuned", meta, LearnedLoss(CROSS_ENTROPY)),
        ("initial", problem.init_meta(key), LearnedLoss(CROSS_ENTROPY)),
        ("own", {}, CrossEntropy()),
    ):
        own, values = problem.with_loss(loss), []
        for t in range(3):
            start = own.init(given, random.fold(key, "init", t))
            batches = own.batches(random.fold(key, t), 20)
            end = unroll(own, given, start, batches, random.fold(key, "steps")).end
            values.append(functional.cross_entropy(own.predict(end, inputs), targets))
        assert found[f"loss_{name}"] == pytest.approx(float(torch.stack(values).mean()), rel=1e-9)
    assert found["loss_tuned"] != found["loss_initial"] == pytest.approx(found["loss_own"], rel=1e-4)


def test_losses_that_forgive_outliers_win_on_planted_data():
    """Learning rates tuned on validation examples, compared on the others."""
    source = HeavyTailedRegression(num_features=2, num_train=500, seed=1)
    problem = task(
        source, lambda d, k: MLP(d, k, (16,)), loss="mse", batch_size=50, scale_targets=False, init_seed=None
    )
    problem.evaluation_runs, problem.evaluation_steps = 2, 200
    best = {}
    for name, loss in (
        ("squared", MeanSquaredError(output="identity")),
        ("absolute", LearnedLoss(ABSOLUTE, output="identity")),
    ):
        ends = []
        for lr in (3e-4, 1e-3, 1e-2):
            run = problem.with_loss(loss)
            run.rule = SGD(lr, momentum=0.9)
            ends.append(run.runs(run.init_meta(random.key(0)), random.key(0)))
        end = min(ends, key=lambda end: problem.score(end, "validation")["error"])
        best[name] = problem.score(end, UNTOUCHED)["error"]
    assert best["absolute"] < 0.5 * best["squared"]


def test_descending_the_meta_gradient_forgives_outliers():
    """A loss between squared and absolute errors is moved by its weights towards the end that wins."""
    source = HeavyTailedRegression(num_features=2, num_train=500, seed=1)
    text = "mul(sub(y,p),tanh(sub(y,p)))"
    problem = task(
        source, lambda d, k: MLP(d, k, (16,)), SGD(0.03), text, horizon=30, scale_targets=False, init_seed=None
    )
    meta = problem.init_meta(random.key(0))
    before = problem.evaluate(meta, random.key(9), test=False)
    for step in range(12):
        key = random.key(step)
        found = Unrolled().estimate(problem, meta, {}, problem.batches(key, 30), key)
        meta = tree.add(meta, found.grad, -0.3)
    after = problem.evaluate(meta, random.key(9), test=False)
    assert after["error_tuned"] < 0.9 * before["error_tuned"] and after["error_initial"] == before["error_initial"]


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: task(untouched=1.0), "untouched is 1.0"),
        (lambda: task(untouched=-0.1), "untouched is -0.1"),
        (lambda: task(sigmoid=True), "sigmoid is true with 3 classes"),
        (lambda: task(loss=MeanSquaredError(output="identity")), "the loss has output 'identity'.*'softmax'"),
        (lambda: task().with_loss(CrossEntropy(output="sigmoid")), "the loss has output 'sigmoid'.*'softmax'"),
        (lambda: task(loss="mul(y"), "position"),
        (lambda: task(outer_batch_size=21), "outer_batch_size is 21"),
        (lambda: task(evaluation_runs=0), "evaluation_runs is 0"),
        (lambda: task(evaluation_steps=0), "evaluation_steps is 0"),
        (lambda: task(horizon=None).evaluate({"weights": torch.ones(5)}, random.key(0), test=False), "are None"),
        (lambda: LossTask(Clusters(), double, SGD(0.1)).output, "not read"),
    ],
)
def test_refuses(build, named):
    with pytest.raises(ValueError, match=named):
        build()


def test_refuses_to_scale_constant_targets():
    source = Line()
    source.read = lambda part: Examples(torch.zeros(30, 4), torch.full((30,), 2.0))
    with pytest.raises(ValueError, match=r"deviation 0\.0"):
        task(source, loss=None)
    assert task(source, loss=None, scale_targets=False).batches(random.key(0), 1).outer.targets.unique() == 2
