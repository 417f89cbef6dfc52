import pytest
import torch
from estimators.conftest import relative, ridge

from metalearn.estimators.unrolled import MODES, Unrolled
from metalearn.optim.first_order import SGD, Adam


@pytest.mark.parametrize("mode", MODES)
def test_matches_the_analytic_hypergradient(mode, quick_estimate):
    problem, meta = ridge()
    found = quick_estimate(Unrolled(mode), problem, meta, steps=250)
    assert relative(found.grad, problem.hypergradient(meta)) <= 1e-10


@pytest.mark.parametrize("rule", [SGD(0.2), SGD(0.1, momentum=0.8), SGD(0.1, momentum=0.8, nesterov=True), Adam(0.05)])
@pytest.mark.parametrize("mode", MODES[1:])
def test_matches_one_graph(mode, rule, quick_estimate):
    problem, meta = ridge(rule=rule)
    whole = quick_estimate(Unrolled("graph"), problem, meta, steps=11)
    found = quick_estimate(Unrolled(mode), problem, meta, steps=11)
    assert relative(found.grad, whole.grad) <= 1e-12
    torch.testing.assert_close(found.loss, whole.loss, rtol=0, atol=0)
