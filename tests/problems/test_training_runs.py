import pytest
import torch
from problems.conftest import Clusters, WithDropout, double, estimate, opened, wide
from torch.nn import functional

from metalearn import random
from metalearn.optim.first_order import SGD, Adam
from metalearn.problems.training_runs import TrainingRun


class LearnedRate(TrainingRun):
    """The plainest resident: one learning rate."""

    def init_meta(self, key):
        return {"lr": torch.tensor(0.1, dtype=torch.float64)}

    def rule_meta(self, meta):
        return meta


def learned_rate(source=None, **options):
    return LearnedRate(source or Clusters(), options.pop("model", double), options.pop("rule", SGD(0.1)), **options)


@pytest.mark.parametrize("rule", [SGD(0.1, momentum=0.9), Adam(0.1)])
def test_matches_torch_training(rule):
    """The engine's full-batch steps, and the outer loss after them, against a module trained by torch.optim."""
    problem = opened(learned_rate(rule=rule, init_seed=3))
    module = double(6, 3)
    start = problem.init({"lr": torch.tensor(0.1)}, random.key(0))
    module.load_state_dict(start.params)
    twin = {SGD: lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), Adam: lambda p: torch.optim.Adam(p, 0.1)}
    optimizer = twin[type(rule)](module.parameters())
    (x, y), (xv, yv) = problem.source.read("train"), problem.source.read("validation")
    for _ in range(15):
        optimizer.zero_grad()
        functional.cross_entropy(module(x.double()), y).backward()
        optimizer.step()
    wanted = functional.cross_entropy(module(xv.double()), yv)
    found = estimate(problem, problem.init_meta(random.key(0)), 15)
    torch.testing.assert_close(found.loss, wanted.detach(), rtol=1e-12, atol=0)


def test_ranks_divide_one_draw_of_outer_examples():
    key, problem = random.key(5), opened(learned_rate(outer_batch_size=12))
    whole = problem.batches(key, 1).outer
    problem.world = 3
    shares = []
    for problem.rank in range(3):
        shares.append(problem.batches(key, 1).outer)
    assert torch.equal(torch.cat([share.inputs for share in shares]), whole.inputs)
    assert len(whole.inputs.unique(dim=0)) == 12
    problem.world = 5
    with pytest.raises(ValueError, match="outer_batch_size is 12"):
        problem.batches(key, 1)


def test_batches_are_the_same_when_asked_again_and_new_in_every_step():
    batches = opened(learned_rate(batch_size=10)).batches(random.key(1), 3)
    assert torch.equal(batches.inner(1).inputs, batches.inner(1).inputs)
    assert not torch.equal(batches.inner(1).inputs, batches.inner(2).inputs)


def test_starts_are_fixed_by_a_seed_alone():
    free, fixed = opened(learned_rate()), opened(learned_rate(init_seed=1))
    starts = [[problem.initial(random.key(seed))[0]["0.weight"] for seed in (0, 1)] for problem in (free, fixed)]
    assert [torch.equal(*pair) for pair in starts] == [False, True]


def test_test_examples_are_sealed_until_asked_for():
    source = Clusters()
    problem = opened(learned_rate(source, horizon=2))
    assert source.opened == ["train", "validation"]
    with pytest.raises(ValueError, match="part is 'test'"):
        problem.evaluate(problem.init_meta(random.key(0)), random.key(0), test=True)
    problem.open(test=True)
    assert source.opened == ["train", "validation", "test"]
    assert problem.evaluate(problem.init_meta(random.key(0)), random.key(0), test=True).keys() == {"loss", "accuracy"}
    found = {"fingerprint": {"base": source.fingerprint()}, "revision": {"base": None}, "division": {}}
    assert problem.record() == found


def test_evaluation_learns():
    problem = opened(learned_rate(Clusters(spread=0.3), horizon=60))
    before, after = (
        problem.evaluate({"lr": torch.tensor(lr, dtype=torch.float64)}, random.key(0), test=False) for lr in (0.0, 0.5)
    )
    assert after["accuracy"] > 0.95 > before["accuracy"]
    assert after["loss"] < before["loss"]


def test_dropout_acts_in_training_only_and_is_keyed():
    problem = opened(learned_rate(model=WithDropout, horizon=3))
    assert problem.global_generator and not opened(learned_rate()).global_generator
    meta = {"lr": torch.tensor(0.1)}
    first, again = (estimate(problem, meta, 3) for _ in range(2))
    assert torch.equal(first.loss, again.loss) and torch.equal(first.grad["lr"], again.grad["lr"])
    state, (x, _) = problem.init(meta, random.key(0)), problem.examples("validation", "cpu")
    assert torch.equal(problem.predict(state, x), problem.predict(state, x))


def test_opening_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    opened(learned_rate(model=wide)).init({"lr": torch.tensor(0.1)}, random.key(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(batch_size=41), "batch_size is 41"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(outer_batch_size=99), "outer_batch_size is 99"),
        (dict(horizon=0), "horizon is 0"),
    ],
)
def test_refuses(options, named):
    with pytest.raises(ValueError, match=named):
        opened(learned_rate(**options))


def test_refuses_to_run_unopened_or_to_evaluate_an_endless_run():
    with pytest.raises(ValueError, match="not read"):
        learned_rate().init({}, random.key(0))
    with pytest.raises(ValueError, match="horizon is None"):
        opened(learned_rate()).evaluate({"lr": torch.tensor(0.1)}, random.key(0), test=False)
