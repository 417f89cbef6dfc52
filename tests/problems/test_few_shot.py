import pytest
import torch
from problems.conftest import Clusters, assert_matches_central_differences, double, estimate, opened, wide
from torch.nn import functional

from metalearn import random, tree
from metalearn.optim.first_order import SGD
from metalearn.problems.few_shot import FewShot
from metalearn.unroll import Tasks, unroll


def few_shot(source=None, model=double, rule=None, **options):
    options = dict(ways=2, shots=1, queries=2, horizon=3, held_out=0.3, evaluation_tasks=20) | options
    return FewShot(source or Clusters(80, num_classes=10), model, rule or SGD(0.5), **options)


def test_matches_maml_by_hand():
    """One step, no proximal term: the gradient of outer(phi - lr grad CE(phi)) by autograd."""
    problem = opened(few_shot(proximal=0.0, horizon=1))
    meta, key = problem.init_meta(random.key(0)), random.key(2)
    found, (support, query) = estimate(problem, meta, 1, seed=2), problem.task(key, "train")
    leaves = {n: v.clone().requires_grad_() for n, v in meta.items()}
    loss = functional.cross_entropy(tree.call(problem.module, leaves, {}, support.inputs)[0], support.targets)
    slopes = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    adapted = {n: v - 0.5 * slope for (n, v), slope in zip(leaves.items(), slopes, strict=True)}
    functional.cross_entropy(tree.call(problem.module, adapted, {}, query.inputs)[0], query.targets).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(found.grad[name], leaf.grad, rtol=1e-10, atol=1e-12)


def test_forward_mode_matches_reverse_mode():
    problem = opened(few_shot())
    meta, key = problem.init_meta(random.key(0)), random.key(2)
    direction = {n: random.normal(random.key(1, n), tuple(v.shape)).double() for n, v in meta.items()}
    batches = problem.batches(key, 3)

    def objective(meta):
        end = unroll(problem, meta, problem.init(meta, key), batches, key).end
        return problem.outer(meta, end, batches.outer)

    _, slope = torch.func.jvp(objective, (meta,), (direction,))
    torch.testing.assert_close(slope, tree.dot(estimate(problem, meta, 3, key=key).grad, direction))


def through_tasks(problem, meta, key):
    """The meta-gradient of one batch of tasks, by one graph."""
    batches = problem.batches(key, problem.horizon)
    end = unroll(problem, meta, problem.init(meta, key), batches, key).end
    loss = problem.outer(meta, end, batches.outer)
    return dict(zip(meta, torch.autograd.grad(loss, list(meta.values())), strict=True))


def test_tasks_together_match_their_mean():
    one = opened(few_shot())
    problem, key = Tasks(one, 3), random.key(5)
    meta = {n: v.requires_grad_() for n, v in one.init_meta(random.key(0)).items()}
    found = through_tasks(problem, meta, key)
    alone = [estimate(one, meta, 3, key=random.fold(key, task)).grad for task in range(3)]
    for name in meta:
        torch.testing.assert_close(found[name], sum(grad[name] for grad in alone) / 3, rtol=1e-10, atol=1e-12)


def test_matches_central_differences():
    problem = opened(few_shot(proximal=0.7, rule=SGD(0.3, momentum=0.5)))
    assert_matches_central_differences(problem, problem.init_meta(random.key(0)), 3)


def test_the_proximal_term_holds_parameters_back():
    ends = []
    for proximal in (0.0, 5.0):
        problem = opened(few_shot(proximal=proximal, horizon=30, rule=SGD(0.1)))
        meta = problem.init_meta(random.key(0))
        end = problem.trained(meta, random.key(1), problem.batches(random.key(1), 30)).end
        ends.append(float(tree.norm(tree.add(end.params, meta, -1.0))))
    assert ends[1] < 0.3 * ends[0]


def test_tasks_hold_different_examples_of_distinct_classes_of_their_part():
    source = Clusters(83, num_classes=10)  # classes of 8 and of 9 examples
    problem = opened(few_shot(source, ways=3, shots=3, queries=5), test=True)
    inputs, targets = source.read("train")
    classes = {}
    for part in ("train", "validation", "test"):
        classes[part] = set(problem.parts[part].targets.tolist())
        for seed in range(20):
            support, query = problem.task(random.key(seed), part)
            rows = [int((inputs == x).all(1).nonzero()) for x in torch.cat([support.inputs, query.inputs]).float()]
            assert len(set(rows)) == 24
            true, labels = targets[rows], torch.cat([support.targets, query.targets])
            pairs = set(zip(true.tolist(), labels.tolist(), strict=True))
            assert {label for _, label in pairs} == {0, 1, 2} and len(pairs) == 3
            assert {original for original, _ in pairs} <= classes[part]
    assert set.union(*classes.values()) == set(range(10)) and sum(len(some) for some in classes.values()) == 10


def test_held_out_accuracy_rises_with_meta_training():
    """Informative directions are shared by the classes: good first parameters know them."""
    source = Clusters(800, num_features=20, num_classes=40, spread=0.4, informative=4)
    one = few_shot(source, wide, SGD(0.3), ways=4, queries=4, evaluation_tasks=100, proximal=0.1)
    problem = opened(Tasks(one, 8), test=True)
    meta = {n: v.requires_grad_() for n, v in problem.init_meta(random.key(0)).items()}
    first = one.evaluate(tree.detach(meta), random.key(9), test=True)
    optimizer = torch.optim.Adam(meta.values(), 0.01)
    for step in range(40):
        for name, grad in through_tasks(problem, meta, random.key(step)).items():
            meta[name].grad = grad
        optimizer.step()
    last = one.evaluate(tree.detach(meta), random.key(9), test=True)
    spread = first["accuracy_half_interval"] + last["accuracy_half_interval"]
    assert last["accuracy"] > first["accuracy"] + spread


def test_evaluation_is_the_mean_over_tasks_run_one_by_one():
    problem = opened(few_shot(queries=6))
    meta, key = problem.init_meta(random.key(0)), random.key(4)
    found = problem.evaluate(meta, key, test=False)
    shares = []
    for i in range(20):
        support, query = problem.task(random.fold(key, "task", i), "validation")
        batches = problem.batches(key, 3)._replace(inner=lambda k, support=support: support)
        end = problem.trained(meta, key, batches).end
        shares.append((problem.predict(end, query.inputs).argmax(1) == query.targets).double().mean())
    shares = torch.stack(shares)
    assert found["accuracy"] == pytest.approx(float(shares.mean()))
    assert found["accuracy_half_interval"] == pytest.approx(1.96 * float(shares.std()) / 20**0.5)


def test_meta_test_classes_are_sealed():
    problem = opened(few_shot())
    with pytest.raises(ValueError, match="part is 'test'"):
        problem.evaluate(problem.init_meta(random.key(0)), random.key(0), test=True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(ways=1), "ways is 1"),
        (dict(shots=0), "shots is 0"),
        (dict(queries=0), "queries is 0"),
        (dict(proximal=-1.0), "proximal is -1.0"),
        (dict(held_out=0.6), "held_out is 0.6"),
        (dict(evaluation_tasks=1), "evaluation_tasks is 1"),
        (dict(ways=4), "ways is 4; accepted: at most the 3 classes of 'validation'"),
        (dict(queries=8), "ways is 2; accepted: at most the 0 classes"),
    ],
)
def test_refuses(options, named):
    with pytest.raises(ValueError, match=named):
        opened(few_shot(**options))
