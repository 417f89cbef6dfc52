import pytest
import torch
from problems.conftest import Clusters, assert_matches_central_differences, double, estimate, opened, wide

from metalearn import random
from metalearn.optim.first_order import SGD
from metalearn.optim.first_order import Adam as AdamRule
from metalearn.problems.distillation import Distillation


def distillation(source=None, model=double, rule=None, **options):
    return Distillation(source or Clusters(), model, rule or SGD(0.5), **options)


@pytest.mark.parametrize("rule", [SGD(0.5), AdamRule(0.05)])
def test_matches_central_differences(rule):
    problem = opened(distillation(rule=rule, horizon=5, per_class=2, learn_lr=True, outer_batch_size=20))
    assert_matches_central_differences(problem, problem.init_meta(random.key(0)), 5)


def test_begins_with_training_examples_of_each_class():
    problem = opened(distillation(per_class=3))
    inputs, targets = problem.examples("train", "cpu")
    images = problem.init_meta(random.key(0))["images"]
    rows = [int((inputs == image).all(1).nonzero()) for image in images]
    assert len(set(rows)) == 9
    assert targets[rows].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] == problem.inner_batch(random.key(0)).tolist()
    noise = opened(distillation(begin="noise")).init_meta(random.key(0))
    assert noise["images"].shape == (3, 6) and noise.keys() == {"images"}


def test_lowers_the_test_error():
    source = Clusters(num_examples=200, num_features=10, num_classes=5, spread=1.2)
    problem = opened(distillation(source, wide, SGD(0.3), horizon=10, learn_lr=True), test=True)
    meta = {n: v.requires_grad_() for n, v in problem.init_meta(random.key(0)).items()}
    optimizer = torch.optim.Adam(meta.values(), 0.05)
    before = problem.evaluate({n: v.detach() for n, v in meta.items()}, random.key(9), test=True)
    for step in range(40):
        found = estimate(problem, meta, 10, seed=step)
        for name, value in meta.items():
            value.grad = found.grad[name]
        optimizer.step()
    after = problem.evaluate({n: v.detach() for n, v in meta.items()}, random.key(9), test=True)
    assert after["accuracy_distilled"] > before["accuracy_distilled"] + 0.1
    assert after["accuracy_distilled"] > after["accuracy_real"] + 0.1


def test_the_baseline_is_training_on_real_images():
    """Images that are the baseline's own draw score as it does."""
    problem = opened(distillation(rule=SGD(0.5), horizon=8, evaluation_inits=1))
    key = random.key(3)
    images = problem.real_images(random.fold(random.fold(key, 0), "real"))
    found = problem.evaluate({"images": images}, key, test=False)
    assert found["accuracy_distilled"] == found["accuracy_real"] > 1 / 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(per_class=0), "per_class is 0"),
        (dict(begin="zeros"), "begin is 'zeros'"),
        (dict(evaluation_inits=0), "evaluation_inits is 0"),
        (dict(horizon=0), "horizon is 0"),
        (dict(rule=SGD(0.0), learn_lr=True), "lr is 0.0"),
        (dict(per_class=14), "per_class is 14"),
    ],
)
def test_refuses(options, named):
    with pytest.raises(ValueError, match=named):
        opened(distillation(**options)).init_meta(random.key(0))
